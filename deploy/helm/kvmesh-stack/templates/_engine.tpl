{{/* What is derived from one item of servingEngineSpec.modelSpec. All take (dict "root" $ "model" $modelSpec). */}}

{{- define "kvmesh.engine.enabled" -}}
{{- if .root.Values.servingEngineSpec.enableEngine -}}
{{- if not (hasKey .model "enabled") -}}yes{{- else if .model.enabled -}}yes{{- end -}}
{{- end -}}
{{- end }}

{{/* Zero is a number too, which `default` would not see. */}}
{{- define "kvmesh.engine.replicas" -}}
{{- if hasKey .model "replicaCount" -}}{{ int .model.replicaCount }}{{- else -}}1{{- end -}}
{{- end }}

{{/* Whether kvmesh is this model's connector. */}}
{{- define "kvmesh.engine.cached" -}}
{{- with .model.lmcacheConfig -}}{{- if .enabled -}}yes{{- end -}}{{- end -}}
{{- end }}

{{/* Whether it shares with peers: p2pEnabled, which is on unless said otherwise. */}}
{{- define "kvmesh.engine.shares" -}}
{{- with .model.lmcacheConfig -}}
{{- if and .enabled (or (not (hasKey . "p2pEnabled")) .p2pEnabled) -}}yes{{- end -}}
{{- end -}}
{{- end }}

{{- define "kvmesh.engine.installs" -}}
{{- if include "kvmesh.engine.cached" . -}}
{{- $how := .root.Values.kvmeshSpec.install -}}
{{- if eq $how "always" -}}yes
{{- else if and (eq $how "auto") (not (has .model.repository .root.Values.kvmeshSpec.imagesWithKvmesh)) -}}yes
{{- end -}}
{{- end -}}
{{- end }}

{{- define "kvmesh.engine.peerPort" -}}
{{- $config := .model.lmcacheConfig | default dict -}}
{{- $config.distributedPort | default .root.Values.kvmeshSpec.peerPort | int -}}
{{- end }}

{{- define "kvmesh.engine.adminPort" -}}
{{- $config := .model.lmcacheConfig | default dict -}}
{{- $config.workerPort | default .root.Values.kvmeshSpec.adminPort | int -}}
{{- end }}

{{- define "kvmesh.engine.poolGb" -}}
{{- $config := .model.lmcacheConfig | default dict -}}
{{- $config.cpuOffloadingBufferSize | default "5" -}}
{{- end }}

{{/* /dev/shm in MiB: the pool, and room for what vLLM's own processes tell each other. */}}
{{- define "kvmesh.engine.shmMib" -}}
{{- $own := include "kvmesh.mib" (.model.shmSize | default "4Gi") | int64 -}}
{{- if include "kvmesh.engine.cached" . -}}
{{- add $own (mulf (include "kvmesh.engine.poolGb" . | float64) 1024 | ceil | int64) -}}
{{- else -}}
{{- $own -}}
{{- end -}}
{{- end }}

{{/* "shared", "each" (a claim per pod) or nothing. One volume that only one host can mount is no use to two pods. */}}
{{- define "kvmesh.engine.storage" -}}
{{- if .model.pvcStorage -}}
{{- $modes := .model.pvcAccessMode | default (list "ReadWriteOnce") -}}
{{- if or (eq (.model.workload | default "Deployment") "StatefulSet") -}}each
{{- else if or (has "ReadWriteMany" $modes) (has "ReadOnlyMany" $modes) (le (include "kvmesh.engine.replicas" . | int) 1) -}}shared
{{- else -}}each
{{- end -}}
{{- end -}}
{{- end }}

{{- define "kvmesh.engine.claimSpec" -}}
accessModes: {{ .model.pvcAccessMode | default (list "ReadWriteOnce") | toJson }}
resources:
  requests:
    storage: {{ .model.pvcStorage | quote }}
{{- with .model.storageClass }}
storageClassName: {{ . | quote }}
{{- end }}
{{- with .model.pvcMatchLabels }}
selector:
  matchLabels:
    {{- toYaml . | nindent 4 }}
{{- end }}
{{- end }}

{{/* Whether hf_token is the tutorial's placeholder, or one like it, and no token. */}}
{{- define "kvmesh.engine.tokenIsPlaceholder" -}}
{{- if kindIs "string" .model.hf_token -}}
{{- if regexMatch "^\\s*<.*>\\s*$" .model.hf_token -}}yes{{- end -}}
{{- end -}}
{{- end }}

{{- define "kvmesh.engine.resources" -}}
{{- if .model.resources -}}
{{- toYaml .model.resources -}}
{{- else -}}
{{- $requests := dict -}}
{{- $limits := dict -}}
{{- with .model.requestCPU }}{{ $_ := set $requests "cpu" (include "kvmesh.plain" .) }}{{ end -}}
{{- with .model.requestMemory }}{{ $_ := set $requests "memory" (include "kvmesh.plain" .) }}{{ end -}}
{{- if .model.requestGPU -}}
{{- $gpu := .model.requestGPUType | default "nvidia.com/gpu" -}}
{{- $_ := set $requests $gpu (include "kvmesh.plain" .model.requestGPU) -}}
{{- $_ := set $limits $gpu (include "kvmesh.plain" .model.requestGPU) -}}
{{- end -}}
{{- with .model.limitCPU }}{{ $_ := set $limits "cpu" (include "kvmesh.plain" .) }}{{ end -}}
{{- with .model.limitMemory }}{{ $_ := set $limits "memory" (include "kvmesh.plain" .) }}{{ end -}}
{{- $resources := dict -}}
{{- if $requests }}{{ $_ := set $resources "requests" $requests }}{{ end -}}
{{- if $limits }}{{ $_ := set $resources "limits" $limits }}{{ end -}}
{{- toYaml $resources -}}
{{- end -}}
{{- end }}

{{/* The instances' YAML file; docs/configuration.md explains the keys. Addresses and names that differ from pod to pod
     come as variables. */}}
{{- define "kvmesh.engine.config" -}}
{{- $own := .model.lmcacheConfig -}}
{{- $values := .root.Values -}}
{{- $config := dict
      "chunk_tokens" (int ($own.chunkSize | default $values.kvmeshSpec.chunkTokens))
      "pool_size_gb" (include "kvmesh.engine.poolGb" . | float64)
      "admin_port" (include "kvmesh.engine.adminPort" . | int)
-}}
{{- if include "kvmesh.engine.shares" . -}}
{{- $_ := set $config "share" true -}}
{{- $_ := set $config "peer_port" (include "kvmesh.engine.peerPort" . | int) -}}
{{- $_ := set $config "transfer_channel" ($own.transferChannel | default $values.kvmeshSpec.transferChannel) -}}
{{- if eq (include "kvmesh.directory" .root) "controller" -}}
{{- $host := include "kvmesh.controllerHost" .root -}}
{{- $ports := $values.controllerSpec.ports -}}
{{- $_ := set $config "enable_controller" true -}}
{{- $_ := set $config "controller_pull_url" (printf "%s:%d" $host (int $ports.pull)) -}}
{{- $_ := set $config "controller_reply_url" (printf "%s:%d" $host (int $ports.reply)) -}}
{{- if $ports.heartbeat -}}
{{- $_ := set $config "controller_heartbeat_url" (printf "%s:%d" $host (int $ports.heartbeat)) -}}
{{- end -}}
{{- end -}}
{{- else -}}
{{- $_ := set $config "share" false -}}
{{- end -}}
{{- merge (deepCopy ($own.config | default dict)) ($values.kvmeshSpec.config | default dict) $config | toYaml -}}
{{- end }}

{{/* The arguments of `vllm`. */}}
{{- define "kvmesh.engine.arguments" -}}
{{- $model := .model -}}
{{- $spec := .root.Values.servingEngineSpec -}}
{{- $vllm := $model.vllmConfig | default dict -}}
{{- $args := list "serve" $model.modelURL "--host" "0.0.0.0" "--port" (include "kvmesh.plain" $spec.containerPort) -}}
{{- with $model.servedModelName }}{{ $args = concat $args (list "--served-model-name" .) }}{{ end -}}
{{- if hasKey $vllm "enableChunkedPrefill" -}}
{{- $args = append $args (ternary "--enable-chunked-prefill" "--no-enable-chunked-prefill" $vllm.enableChunkedPrefill) -}}
{{- end -}}
{{- if hasKey $vllm "enablePrefixCaching" -}}
{{- $args = append $args (ternary "--enable-prefix-caching" "--no-enable-prefix-caching" $vllm.enablePrefixCaching) -}}
{{- end -}}
{{- $named := dict "maxModelLen" "--max-model-len" "dtype" "--dtype" "tensorParallelSize" "--tensor-parallel-size" "maxNumSeqs" "--max-num-seqs" "gpuMemoryUtilization" "--gpu-memory-utilization" "maxLoras" "--max-loras" "runner" "--runner" "convert" "--convert" "quantization" "--quantization" "blockSize" "--block-size" -}}
{{- range $key := keys $named | sortAlpha -}}
{{- if hasKey $vllm $key -}}{{- $args = concat $args (list (get $named $key) (include "kvmesh.plain" (get $vllm $key))) -}}{{- end -}}
{{- end -}}
{{- if $model.enableLoRA }}{{ $args = append $args "--enable-lora" }}{{ end -}}
{{- if $model.enableTool }}{{ $args = append $args "--enable-auto-tool-choice" }}{{ end -}}
{{- with $model.toolCallParser }}{{ $args = concat $args (list "--tool-call-parser" .) }}{{ end -}}
{{- with $model.chatTemplate }}{{ $args = concat $args (list "--chat-template" (printf "/templates/%s" .)) }}{{ end -}}
{{- if include "kvmesh.engine.cached" . -}}
{{- $args = concat $args (list "--kv-transfer-config" `{"kv_connector":"KVMeshConnector","kv_role":"kv_both"}`) -}}
{{- end -}}
{{- if has "--shutdown-timeout" ($vllm.extraArgs | default list) | not -}}
{{- $args = concat $args (list "--shutdown-timeout" (include "kvmesh.plain" $spec.drain.requestsSeconds)) -}}
{{- end -}}
{{- range $vllm.extraArgs }}{{ $args = append $args (include "kvmesh.plain" .) }}{{ end -}}
{{- toYaml $args -}}
{{- end }}

{{/* Puts kvmesh before the image's own packages, where it was installed beside them, and starts vLLM in its place. */}}
{{- define "kvmesh.engine.environment" -}}
PATH="/opt/venv/bin:$PATH"  # where the images of LMCache have their vLLM
export PATH
{{- if include "kvmesh.engine.installs" . }}
python=$(python3 -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
PYTHONPATH="/kvmesh/any:/kvmesh/$python${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
{{- end }}
{{- end }}
