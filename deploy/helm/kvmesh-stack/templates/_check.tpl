{{/* What the schema cannot say: values that do not go together. All problems at once, each with the way out. */}}
{{- define "kvmesh.check" -}}
{{- $problems := list -}}
{{- $values := .Values -}}
{{- $names := dict -}}
{{- $directory := include "kvmesh.directory" . -}}

{{- range $key, $why := include "kvmesh.unsupported" . | fromYaml -}}
{{- if hasKey $values $key }}{{ $problems = append $problems (printf "%s: %s" $key $why) }}{{ end -}}
{{- end -}}

{{- if and (eq $directory "redis") (not (hasKey $values "lookupserverSpec")) -}}
{{- $problems = append $problems "kvmeshSpec.directory is redis, but there is no lookupserverSpec: add one (it may be just `lookupserverSpec: {}`), or set directory: controller" -}}
{{- end -}}
{{- if and (eq $directory "controller") (eq (toString $values.controllerSpec.enabled) "false") (not $values.controllerSpec.host) -}}
{{- $problems = append $problems "controllerSpec.enabled is false and controllerSpec.host is empty, but the directory is the controller: give controllerSpec.host, remove enabled: false, or add lookupserverSpec" -}}
{{- end -}}
{{- with $values.lookupserverSpec -}}
{{- if and .replicaCount (gt (int .replicaCount) 1) -}}
{{- $problems = append $problems (printf "lookupserverSpec.replicaCount is %d: several Redis servers that know nothing of each other would split the directory. Leave it at 1, or give the address of a Redis Cluster as lookupserverSpec.externalUrl" (int .replicaCount)) -}}
{{- end -}}
{{- if and .externalUrl .externalUrlSecret -}}
{{- $problems = append $problems "lookupserverSpec.externalUrl and externalUrlSecret are both there: keep one" -}}
{{- end -}}
{{- end -}}

{{- $router := $values.routerSpec -}}
{{- if and $router.enableRouter (has $router.routingLogic (list "kv" "kvaware")) (ne $directory "controller") -}}
{{- $problems = append $problems (printf "routerSpec.routingLogic %s asks the controller who holds what, but the directory is a lookup server: set kvmeshSpec.directory: controller, or choose another routingLogic (prefix needs no directory)" $router.routingLogic) -}}
{{- end -}}
{{- if and $router.enableRouter (eq $router.serviceDiscovery "static") (not $router.staticBackends) -}}
{{- $problems = append $problems "routerSpec.serviceDiscovery is static, but routerSpec.staticBackends is empty: list the engines, such as http://engine-1:8000,http://engine-2:8000" -}}
{{- end -}}
{{- $needed := add $values.servingEngineSpec.drain.forgetSeconds $values.servingEngineSpec.drain.handOverSeconds $values.servingEngineSpec.drain.requestsSeconds -}}
{{- if gt (int $needed) (int $values.servingEngineSpec.terminationGracePeriodSeconds) -}}
{{- $problems = append $problems (printf "servingEngineSpec.drain takes up to %d s, but terminationGracePeriodSeconds is %d: the pod would be killed in between. Raise it, or shorten drain" (int $needed) (int $values.servingEngineSpec.terminationGracePeriodSeconds)) -}}
{{- end -}}

{{- $ports := dict -}}
{{- range $index, $model := $values.servingEngineSpec.modelSpec -}}
{{- $engine := dict "root" $ "model" $model -}}
{{- $at := printf "servingEngineSpec.modelSpec[%d] (%s)" $index $model.name -}}
{{- if hasKey $names $model.name -}}
{{- $problems = append $problems (printf "%s: the name is taken by an earlier item; every model needs one of its own" $at) -}}
{{- end -}}
{{- $_ := set $names $model.name true -}}
{{- if gt (len (printf "%s-%s-deployment-vllm" $.Release.Name $model.name)) 63 -}}
{{- $problems = append $problems (printf "%s: with the release's name this makes names of more than 63 characters; choose a shorter one" $at) -}}
{{- end -}}
{{- range $key, $why := dict "raySpec" "one instance on several hosts has no common host pool; use tensor parallelism within a host" "keda" "this chart makes no ScaledObject; make one for the Deployment of the model" "nodeGroupSpec" "use nodeSelector or affinity" -}}
{{- if hasKey $model $key }}{{ $problems = append $problems (printf "%s.%s: %s" $at $key $why) }}{{ end -}}
{{- end -}}
{{- $config := $model.lmcacheConfig | default dict -}}
{{- range $key := list "enablePD" "kvRole" "nixlRole" -}}
{{- if get $config $key }}{{ $problems = append $problems (printf "%s.lmcacheConfig.%s: prefill and decode on separate engines is another feature than sharing between equals; remove the key" $at $key) }}{{ end -}}
{{- end -}}
{{- if and $config.p2pEnabled (not $config.enabled) -}}
{{- $problems = append $problems (printf "%s.lmcacheConfig: p2pEnabled is true, but enabled is not: set enabled: true, or remove p2pEnabled" $at) -}}
{{- end -}}
{{- $vllm := $model.vllmConfig | default dict -}}
{{- if eq (toString ($vllm.v0 | default 0)) "1" -}}
{{- $problems = append $problems (printf "%s.vllmConfig.v0: vLLM's first engine has no connectors of this kind; remove the key" $at) -}}
{{- end -}}
{{- if and $model.chatTemplate (not $model.chatTemplateConfigMap) (not $model.extraVolumeMounts) -}}
{{- $problems = append $problems (printf "%s.chatTemplate names a file in /templates, but nothing is mounted there: give chatTemplateConfigMap, the ConfigMap that holds it" $at) -}}
{{- end -}}
{{- range $key, $_ := merge dict ($config.config | default dict) ($values.kvmeshSpec.config | default dict) -}}
{{- if has $key (list "instance_id" "lmcache_instance_id" "host" "p2p_host" "advertise_host" "peer_port" "p2p_init_ports" "admin_port" "lmcache_worker_ports" "cluster_key_file" "enable_controller" "controller_pull_url" "controller_reply_url" "controller_heartbeat_url" "controller_url" "lookup_url" "distributed_url" "share" "enable_p2p") -}}
{{- $problems = append $problems (printf "%s: the key %s of kvmesh's configuration is set by this chart, which also makes Services and network policies of it; use the chart's own value for it (see the README)" $at $key) -}}
{{- end -}}
{{- end -}}
{{- if include "kvmesh.engine.cached" $engine -}}
{{- $peer := include "kvmesh.engine.peerPort" $engine -}}
{{- $admin := include "kvmesh.engine.adminPort" $engine -}}
{{- $http := include "kvmesh.plain" $values.servingEngineSpec.containerPort -}}
{{- if or (eq $peer $admin) (eq $peer $http) (eq $admin $http) -}}
{{- $problems = append $problems (printf "%s: the ports for peers (distributedPort, %s), of the node's page (workerPort, %s) and of vLLM (containerPort, %s) must differ" $at $peer $admin $http) -}}
{{- end -}}
{{- if $model.hostNetwork -}}
{{- range $port := list $peer $admin -}}
{{- if hasKey $ports $port -}}
{{- $problems = append $problems (printf "%s: port %s is used by %s too, and both use the host's network: give each its own distributedPort and workerPort" $at $port (get $ports $port)) -}}
{{- end -}}
{{- $_ := set $ports $port $model.name -}}
{{- end -}}
{{- end -}}
{{- $limit := $model.limitMemory | default (dig "resources" "limits" "memory" "" $model) -}}
{{- $shm := include "kvmesh.engine.shmMib" $engine | int64 -}}
{{- if $limit -}}
{{- if le (include "kvmesh.mib" $limit | int64) $shm -}}
{{- $problems = append $problems (printf "%s: the memory limit is %v, but the host pool (cpuOffloadingBufferSize: %v GiB) and vLLM's own shared memory alone take up to %d MiB of it: raise the limit, or make the pool smaller" $at $limit (include "kvmesh.engine.poolGb" $engine) $shm) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if $problems -}}
{{- fail (printf "\n\nThese values cannot work:\n  - %s\n" (uniq $problems | join "\n  - ")) -}}
{{- end -}}
{{- end }}

{{/* Top-level keys of production-stack's values that this chart cannot serve, and why. */}}
{{- define "kvmesh.unsupported" -}}
loraAdapters: this chart has no LoRA controller; load adapters with vllmConfig.extraArgs (--lora-modules)
loraController: this chart has no LoRA controller; load adapters with vllmConfig.extraArgs (--lora-modules)
sharedPvcStorage: use extraVolumes and extraVolumeMounts
sharedStorage: use extraVolumes and extraVolumeMounts
{{- end }}

{{/* What is accepted and has no effect: a YAML list of sentences. NOTES.txt shows it. */}}
{{- define "kvmesh.ignored" -}}
{{- $said := list -}}
{{- if hasKey .Values "cacheserverSpec" -}}
{{- $said = append $said "cacheserverSpec: no cache server is started; engines pull from each other" -}}
{{- end -}}
{{- with .Values.lookupserverSpec -}}
{{- if .serde -}}
{{- $said = append $said (printf "lookupserverSpec.serde (%v): chunks never pass through the lookup server, so nothing is serialised for it" .serde) -}}
{{- end -}}
{{- if ne (include "kvmesh.directory" $) "redis" -}}
{{- $said = append $said "lookupserverSpec: kvmeshSpec.directory is controller, so no lookup server is started" -}}
{{- end -}}
{{- end -}}
{{- range .Values.servingEngineSpec.modelSpec -}}
{{- $config := .lmcacheConfig | default dict -}}
{{- $name := .name -}}
{{- range $key, $why := dict "diskOffloadingBufferSize" "there is no disk tier" "enableController" "kvmeshSpec.directory decides" "instanceId" "each pod's name is its instance id" "controllerPort" "controllerSpec.ports decides" "enableNixl" "kvmeshSpec.transferChannel decides" "nixlPeerHost" "peers find each other" "nixlPeerPort" "peers find each other" "nixlBufferSize" "chunks are written where vLLM wants them" "nixlBufferDevice" "chunks are written where vLLM wants them" "cudaVisibleDevices" "Kubernetes assigns GPUs" "logLevel" "set kvmeshSpec.config.log_level" -}}
{{- if hasKey $config $key -}}
{{- $said = append $said (printf "%s: lmcacheConfig.%s: %s" $name $key $why) -}}
{{- end -}}
{{- end -}}
{{- if and (not (include "kvmesh.engine.shares" (dict "root" $ "model" .))) (hasKey $config "distributedPort") -}}
{{- $said = append $said (printf "%s: lmcacheConfig.distributedPort: this model does not share" $name) -}}
{{- end -}}
{{- end -}}
{{- range $key := list "engineScrapeInterval" "requestStatsWindow" "lmcacheControllerPort" "hf_token" -}}
{{- if hasKey $.Values.routerSpec $key -}}
{{- $said = append $said (printf "routerSpec.%s: this router has no such thing" $key) -}}
{{- end -}}
{{- end -}}
{{- with .Values.routerSpec.staticModels -}}
{{- $said = append $said "routerSpec.staticModels: the router asks the engines which models they serve" -}}
{{- end -}}
{{- toYaml $said -}}
{{- end }}
