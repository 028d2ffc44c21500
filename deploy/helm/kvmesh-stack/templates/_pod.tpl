{{/* The pod of an engine, for Deployments and StatefulSets. Takes (dict "root" $ "model" $modelSpec). */}}
{{- define "kvmesh.engine.pod" -}}
{{- $root := .root -}}
{{- $values := .root.Values -}}
{{- $spec := .root.Values.servingEngineSpec -}}
{{- $model := .model -}}
{{- $cached := include "kvmesh.engine.cached" . -}}
{{- $shares := include "kvmesh.engine.shares" . -}}
{{- $installs := include "kvmesh.engine.installs" . -}}
{{- $storage := include "kvmesh.engine.storage" . -}}
metadata:
  labels:
    {{- include "kvmesh.podLabels" (dict "root" $root "component" "engine" "model" $model.name "extra" $spec.labels) | nindent 4 }}
  {{- if or $cached $model.podAnnotations }}
  annotations:
    {{- with $model.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- if $cached }}
    checksum/kvmesh: {{ include "kvmesh.engine.config" . | sha256sum }}
    {{- end }}
  {{- end }}
spec:
  {{- include "kvmesh.pullSecrets" (dict "root" $root "more" $model.imagePullSecret) | indent 2 }}
  # Variables for every service of the namespace would only be in the way of KVMESH_ and LMCACHE_ ones.
  enableServiceLinks: false
  automountServiceAccountToken: false
  {{- with $model.serviceAccountName }}
  serviceAccountName: {{ . }}
  {{- end }}
  {{- with $model.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $model.runtimeClassName | default $spec.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $spec.schedulerName }}
  schedulerName: {{ . }}
  {{- end }}
  {{- if $model.hostNetwork }}
  hostNetwork: true
  dnsPolicy: ClusterFirstWithHostNet
  {{- end }}
  terminationGracePeriodSeconds: {{ $spec.terminationGracePeriodSeconds | int }}
  {{- with $spec.securityContext }}
  securityContext:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $model.nodeName }}
  nodeName: {{ . }}
  {{- end }}
  {{- with $model.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with concat ($spec.tolerations | default list) ($model.tolerations | default list) }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if or $model.affinity $model.nodeSelectorTerms }}
  affinity:
    {{- with $model.affinity }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- with $model.nodeSelectorTerms }}
    nodeAffinity:
      requiredDuringSchedulingIgnoredDuringExecution:
        nodeSelectorTerms:
          {{- toYaml . | nindent 10 }}
    {{- end }}
  {{- end }}
  {{- if $spec.topologySpread }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "kvmesh.selector" (dict "root" $root "component" "engine") | nindent 10 }}
  {{- end }}
  {{- if or $installs $model.initContainer }}
  initContainers:
    {{- if $installs }}
    # kvmesh for each version of Python, beside which the image's own vLLM finds what it needs.
    - name: kvmesh
      image: {{ include "kvmesh.image" $root | quote }}
      imagePullPolicy: {{ $values.kvmeshSpec.image.pullPolicy }}
      command: [cp, -r, /opt/kvmesh/site/., /kvmesh]
      resources:
        requests: {cpu: 10m, memory: 32Mi}
        limits: {memory: 256Mi}
      securityContext:
        {{- include "kvmesh.plainContainerSecurity" $root | nindent 8 }}
      volumeMounts:
        - name: kvmesh
          mountPath: /kvmesh
    {{- end }}
    {{- with $model.initContainer }}
    - name: {{ .name | quote }}
      image: {{ .image | quote }}
      {{- with .command }}
      command: {{ toJson . }}
      {{- end }}
      {{- with .args }}
      args: {{ toJson . }}
      {{- end }}
      {{- with .env }}
      env:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .resources }}
      resources:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- if and .mountPvcStorage $storage }}
      volumeMounts:
        - name: storage
          mountPath: /data
      {{- end }}
    {{- end }}
  {{- end }}
  containers:
    - name: vllm
      image: "{{ $model.repository }}:{{ $model.tag }}"
      imagePullPolicy: {{ $model.imagePullPolicy | default $spec.imagePullPolicy }}
      command:
        - /bin/sh
        - -ec
        - |
          {{- include "kvmesh.engine.environment" . | trim | nindent 10 }}
          exec vllm "$@"
        - vllm
      args:
        {{- include "kvmesh.engine.arguments" . | nindent 8 }}
      env:
        # Declared first, because others are made of them.
        - name: POD_IP
          valueFrom: {fieldRef: {fieldPath: status.podIP}}
        - name: POD_NAME
          valueFrom: {fieldRef: {fieldPath: metadata.name}}
        - name: VLLM_HOST_IP
          value: $(POD_IP)
        - name: HF_HOME
          value: {{ ternary "/data" "/tmp/huggingface" (ne $storage "") }}
        {{- if $cached }}
        - name: KVMESH_CONFIG_FILE
          value: /kvmesh-config/kvmesh.yaml
        - name: KVMESH_INSTANCE_ID
          value: $(POD_NAME)
        - name: KVMESH_HOST
          value: $(POD_IP)
        {{- end }}
        {{- if $shares }}
        {{- include "kvmesh.clusterKeyVariable" $root | nindent 8 }}
        {{- if eq (include "kvmesh.directory" $root) "redis" }}
        {{- include "kvmesh.lookupVariables" $root | trim | nindent 8 }}
        {{- end }}
        {{- end }}
        {{- if and $model.hf_token (not (include "kvmesh.engine.tokenIsPlaceholder" .)) }}
        - name: HF_TOKEN
          valueFrom:
            secretKeyRef:
              {{- if kindIs "string" $model.hf_token }}
              name: {{ $root.Release.Name }}-secrets
              key: hf_token_{{ $model.name }}
              {{- else }}
              name: {{ $model.hf_token.secretName }}
              key: {{ $model.hf_token.secretKey }}
              {{- end }}
        {{- end }}
        {{- with $spec.vllmApiKey }}
        - name: VLLM_API_KEY
          valueFrom:
            secretKeyRef:
              {{- if kindIs "string" . }}
              name: {{ $root.Release.Name }}-secrets
              key: vllmApiKey
              {{- else }}
              name: {{ .secretName }}
              key: {{ .secretKey }}
              {{- end }}
        {{- end }}
        {{- with concat ($spec.env | default list) ($model.env | default list) }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        - name: http
          containerPort: {{ $spec.containerPort | int }}
        {{- if $shares }}
        - name: peers
          containerPort: {{ include "kvmesh.engine.peerPort" . }}
        {{- end }}
        {{- if $cached }}
        - name: node-admin
          containerPort: {{ include "kvmesh.engine.adminPort" . }}
        {{- end }}
      startupProbe:
        httpGet: {path: /health, port: http}
        {{- toYaml $spec.startupProbe | nindent 8 }}
      readinessProbe:
        httpGet: {path: /health, port: http}
        {{- toYaml $spec.readinessProbe | nindent 8 }}
      livenessProbe:
        httpGet: {path: /health, port: http}
        {{- toYaml $spec.livenessProbe | nindent 8 }}
      lifecycle:
        preStop:
          exec:
            command:
              - /bin/sh
              - -c
              - |
                # Time for the router and for Kubernetes to forget this pod. What it does not finish now, vLLM does after it.
                sleep {{ int $spec.drain.forgetSeconds }}
                {{- if and $shares $spec.drain.handOverSeconds }}
                # The chunks that only this engine holds go to the others. What fails costs misses, so nobody waits for it.
                {{- include "kvmesh.engine.environment" . | trim | nindent 16 }}
                {{- if eq (include "kvmesh.directory" $root) "controller" }}
                python3 -m kvmesh.cli ops drain "$POD_NAME" --yes --within {{ int $spec.drain.handOverSeconds }}s --controller http://{{ include "kvmesh.controllerHost" $root }}:{{ int $values.controllerSpec.ports.http }} || true
                {{- else }}
                case "$POD_IP" in *:*) node="[$POD_IP]" ;; *) node=$POD_IP ;; esac
                python3 -m kvmesh.cli ops drain "$POD_NAME" --yes --within {{ int $spec.drain.handOverSeconds }}s --node "http://$node:{{ include "kvmesh.engine.adminPort" . }}" || true
                {{- end }}
                {{- end }}
      {{- with include "kvmesh.engine.resources" . | fromYaml }}
      resources:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $spec.containerSecurityContext }}
      securityContext:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      volumeMounts:
        - name: shm
          mountPath: /dev/shm
        {{- if $cached }}
        - name: kvmesh-config
          mountPath: /kvmesh-config
          readOnly: true
        {{- end }}
        {{- if $installs }}
        - name: kvmesh
          mountPath: /kvmesh
          readOnly: true
        {{- end }}
        {{- if $storage }}
        - name: storage
          mountPath: /data
        {{- end }}
        {{- if $model.chatTemplateConfigMap }}
        - name: templates
          mountPath: /templates
          readOnly: true
        {{- end }}
        {{- with concat ($spec.extraVolumeMounts | default list) ($model.extraVolumeMounts | default list) }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    # The host pool lies here; it counts as memory of the container.
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ include "kvmesh.engine.shmMib" . }}Mi
    {{- if $cached }}
    - name: kvmesh-config
      configMap:
        name: {{ $root.Release.Name }}-{{ $model.name }}-kvmesh-config
    {{- end }}
    {{- if $installs }}
    - name: kvmesh
      emptyDir: {sizeLimit: 200Mi}
    {{- end }}
    {{- if eq $storage "shared" }}
    - name: storage
      persistentVolumeClaim:
        claimName: {{ $root.Release.Name }}-{{ $model.name }}-storage-claim
    {{- else if and (eq $storage "each") (ne ($model.workload | default "Deployment") "StatefulSet") }}
    - name: storage
      ephemeral:
        volumeClaimTemplate:
          {{- with $model.pvcLabels }}
          metadata:
            labels:
              {{- toYaml . | nindent 14 }}
          {{- end }}
          spec:
            {{- include "kvmesh.engine.claimSpec" . | nindent 12 }}
    {{- end }}
    {{- with $model.chatTemplateConfigMap }}
    - name: templates
      configMap:
        name: {{ . }}
    {{- end }}
    {{- with concat ($spec.extraVolumes | default list) ($model.extraVolumes | default list) }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}
