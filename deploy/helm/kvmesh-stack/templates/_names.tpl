{{/* Names and labels. Selectors use only the chart's own labels: the release is always among them, so that two releases
     in one namespace never mix. */}}

{{- define "kvmesh.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- with .model }}
model: {{ . }}
{{- end }}
{{- end }}

{{/* A person's labels come first, so that none of them can change what a selector looks at. */}}
{{- define "kvmesh.labels" -}}
{{- $own := include "kvmesh.selector" . | fromYaml -}}
{{- $own = merge $own (dict "app.kubernetes.io/managed-by" .root.Release.Service "app.kubernetes.io/version" .root.Chart.AppVersion "helm.sh/chart" (printf "%s-%s" .root.Chart.Name .root.Chart.Version)) -}}
{{- merge $own (.extra | default dict) | toYaml -}}
{{- end }}

{{/* The same without what changes with every version: a pod must not be replaced only because the chart is newer. */}}
{{- define "kvmesh.podLabels" -}}
{{- merge (include "kvmesh.selector" . | fromYaml) (.extra | default dict) | toYaml -}}
{{- end }}

{{- define "kvmesh.secretName" -}}
{{ .Release.Name }}-kvmesh
{{- end }}

{{- define "kvmesh.image" -}}
{{- with .Values.kvmeshSpec.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "kvmesh.routerImage" -}}
{{- $router := .Values.routerSpec -}}
{{- if $router.repository -}}
{{ $router.repository }}:{{ $router.tag | default .Chart.AppVersion }}
{{- else -}}
{{ include "kvmesh.image" . }}
{{- end -}}
{{- end }}

{{- define "kvmesh.pullSecrets" -}}
{{- $names := list -}}
{{- range .root.Values.kvmeshSpec.imagePullSecrets }}{{ $names = append $names .name }}{{ end -}}
{{- with .more }}{{ $names = append $names . }}{{ end -}}
{{- if $names }}
imagePullSecrets:
{{- range uniq $names }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{/* What every pod of ours has that runs nothing but our own programs. */}}
{{- define "kvmesh.plainPodSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "kvmesh.plainContainerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* "40Gi", "8G", 512: in MiB, rounded down. */}}
{{- define "kvmesh.mib" -}}
{{- $text := toString . -}}
{{- $number := regexFind "^[0-9]+([.][0-9]+)?" $text | float64 -}}
{{- $unit := regexFind "[A-Za-z]*$" $text -}}
{{- $mib := dict "Ki" 0.0009765625 "Mi" 1.0 "Gi" 1024.0 "Ti" 1048576.0 "k" 0.00095367431640625 "K" 0.00095367431640625 "M" 0.95367431640625 "G" 953.67431640625 "T" 953674.31640625 "" 0.00000095367431640625 -}}
{{- mulf $number (get $mib $unit | default 0.0) | floor | int64 -}}
{{- end }}

{{/* Which directory the instances use: "controller" or "redis". */}}
{{- define "kvmesh.directory" -}}
{{- $wanted := .Values.kvmeshSpec.directory -}}
{{- if ne $wanted "auto" -}}{{ $wanted }}
{{- else if hasKey .Values "lookupserverSpec" -}}redis
{{- else -}}controller
{{- end -}}
{{- end }}

{{- define "kvmesh.runsController" -}}
{{- $enabled := toString .Values.controllerSpec.enabled -}}
{{- if and (not .Values.controllerSpec.host) (or (eq $enabled "true") (and (eq $enabled "auto") (eq (include "kvmesh.directory" .) "controller"))) -}}yes{{- end -}}
{{- end }}

{{- define "kvmesh.runsRedis" -}}
{{- with .Values.lookupserverSpec -}}
{{- if and (eq (include "kvmesh.directory" $) "redis") (not .externalUrl) (not .externalUrlSecret) -}}yes{{- end -}}
{{- end -}}
{{- end }}

{{- define "kvmesh.controllerHost" -}}
{{ .Values.controllerSpec.host | default (printf "%s-controller-service" .Release.Name) }}
{{- end }}

{{- define "kvmesh.lookupHost" -}}
{{ .Release.Name }}-lookup-server-service
{{- end }}

{{/* The variable with the cluster key. */}}
{{- define "kvmesh.clusterKeyVariable" -}}
- name: KVMESH_CLUSTER_KEY
  valueFrom:
    secretKeyRef:
      {{- with .Values.kvmeshSpec.clusterKey }}
      name: {{ .existingSecret | default (include "kvmesh.secretName" $) }}
      key: {{ .secretKey }}
      {{- end }}
{{- end }}

{{/* Variables that make up the directory's address where it is Redis: the password stays in its Secret. */}}
{{- define "kvmesh.lookupVariables" -}}
{{- $spec := .Values.lookupserverSpec -}}
{{- if $spec.externalUrl }}
- name: KVMESH_LOOKUP_URL
  value: {{ $spec.externalUrl | quote }}
{{- else if $spec.externalUrlSecret }}
- name: KVMESH_LOOKUP_URL
  valueFrom:
    secretKeyRef:
      name: {{ $spec.externalUrlSecret.secretName }}
      key: {{ $spec.externalUrlSecret.secretKey }}
{{- else }}
- name: LOOKUP_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ include "kvmesh.secretName" . }}
      key: lookup-password
- name: KVMESH_LOOKUP_URL
  value: redis://:$(LOOKUP_PASSWORD)@{{ include "kvmesh.lookupHost" . }}:{{ $spec.servicePort | default 8100 }}
{{- end }}
{{- end }}

{{/* A value as people wrote it: Helm reads every number as a float and would print 1048576 as 1.048576e+06. */}}
{{- define "kvmesh.plain" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) }}{{ int64 . }}{{ else }}{{ . }}{{ end -}}
{{- end }}

{{- define "kvmesh.routerLivePath" -}}/healthz{{- end }}
{{- define "kvmesh.routerReadyPath" -}}/readyz{{- end }}
