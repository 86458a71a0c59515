{{/* Flower, an aggregator, and what runs their apps. See docs/flower.md, "On several machines". */}}

{{- define "hybrid.flower.env" -}}
- name: FLWR_HOME
  value: /tmp/flwr
- name: FLWR_TELEMETRY_ENABLED
  value: "0"
- name: FLWR_DISABLE_UPDATE_CHECK
  value: "1"
{{- end }}

{{- define "hybrid.superlink.containers" -}}
{{- $superlink := .Values.superlink -}}
- name: superlink
  {{- include "hybrid.container" (dict "top" . "values" $superlink "role" "training" "env" (include "hybrid.flower.env" .) "mounts" (include "hybrid.superlink.mounts" .)) | nindent 2 }}
  command: [flower-superlink]
  args:
    - "--host={{ .Values.listen }}"
    - --port=8095
    - --ssl-certfile=/etc/hybrid/superlink-tls/tls.crt
    - --ssl-keyfile=/etc/hybrid/superlink-tls/tls.key
    - --ssl-ca-certfile=/etc/hybrid/superlink-tls/ca.crt
    - --isolation=process
    - --superexec-auth-secret-file=/etc/hybrid/superexec/superlink
    - --database=/data/superlink.db
    - --enable-supernode-auth
    - --disable-runtime-dependency-installation
    - "--health-server-address={{ include "hybrid.listen" . }}:8096"
    {{- with $superlink.extraArgs }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  ports:
    - {name: flower, containerPort: 8095}
    - {name: health, containerPort: 8096}
  startupProbe:
    grpc: {port: 8096}
    periodSeconds: 2
    failureThreshold: 60
  readinessProbe:
    grpc: {port: 8096}
    periodSeconds: 5
    timeoutSeconds: 3
  livenessProbe:
    grpc: {port: 8096}
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 6
- name: apps # starts the ServerApp, which needs its job and nothing else
  {{- include "hybrid.container" (dict "top" . "values" $superlink "resources" $superlink.apps.resources "role" "training" "env" (include "hybrid.flower.env" .) "mounts" (include "hybrid.serverapp.mounts" .)) | nindent 2 }}
  command: [python, -m, hybrid.local, superexec]
  args:
    - "--runtime-api-address={{ include "hybrid.at" (list . "superlink") }}:8095"
    - --root-certificates=/etc/hybrid/superlink-ca/ca.crt
    - --superexec-auth-secret-file=/etc/hybrid/superexec/superlink
{{- if include "hybrid.starts" . }}
- name: start # registers the SuperNodes' keys, begins the training that was prepared; ends where its run does, and then lets it go on
  {{- include "hybrid.container" (dict "top" . "values" $superlink "resources" $superlink.start.resources "role" "training" "env" (include "hybrid.flower.env" .) "mounts" (include "hybrid.start.mounts" .)) | nindent 2 }}
  command: [python, -m, hybrid.federation.start, --follow]
  args:
    - "--superlink={{ include "hybrid.at" (list . "superlink") }}:8095"
    - --authority=/etc/hybrid/superlink-ca/ca.crt
    - "--job=/workspace/fleets/{{ .Values.aggregator.fleet }}/job"
    {{- range $index := until (int .Values.aggregator.replicas) }}
    - "--node=/etc/hybrid/nodes/node-{{ $index }}.pub"
    {{- end }}
{{- end }}
{{- end }}

{{/* Whether the SuperLink's pod begins a training; else it is begun by hand. */}}
{{- define "hybrid.starts" -}}
{{- if and .Values.aggregator.enabled .Values.aggregator.fleet }}yes{{ end -}}
{{- end }}

{{- define "hybrid.superlink.mounts" -}}
- {name: data, mountPath: /data}
- {name: superlink-tls, mountPath: /etc/hybrid/superlink-tls, readOnly: true}
- {name: superexec, mountPath: /etc/hybrid/superexec, readOnly: true}
{{- end }}

{{- define "hybrid.serverapp.mounts" -}}
{{- with .Values.aggregator.fleet }}
{{ include "hybrid.folder" (list (printf "fleets/%s/job" .) "rw") }}
{{- end }}
- {name: superlink-ca, mountPath: /etc/hybrid/superlink-ca, readOnly: true}
- {name: superexec, mountPath: /etc/hybrid/superexec, readOnly: true}
{{- end }}

{{- define "hybrid.start.mounts" -}}
{{ include "hybrid.folder" (list (printf "fleets/%s/job" .Values.aggregator.fleet) "ro") }}
- {name: superlink-ca, mountPath: /etc/hybrid/superlink-ca, readOnly: true}
- {name: nodes, mountPath: /etc/hybrid/nodes, readOnly: true}
{{- end }}

{{- define "hybrid.superlink.volumes" -}}
{{ include "hybrid.workspaceVolume" . }}
{{ include "hybrid.secretVolume" (dict "name" "superlink-tls" "secret" .Values.superlink.tls.existingSecret) }}
{{ include "hybrid.secretVolume" (dict "name" "superlink-ca" "secret" .Values.superlink.tls.existingSecret "items" (dict "ca.crt" "ca.crt")) }}
{{ include "hybrid.secretVolume" (dict "name" "superexec" "secret" .Values.superlink.superexec.existingSecret "items" (dict "superlink" "superlink")) }}
{{- if include "hybrid.starts" . }}
{{- $public := dict }}
{{- range $index := until (int .Values.aggregator.replicas) }}
{{- $_ := set $public (printf "node-%d.pub" $index) (printf "node-%d.pub" $index) }}
{{- end }}
{{ include "hybrid.secretVolume" (dict "name" "nodes" "secret" .Values.aggregator.existingSecret "items" $public) }}
{{- end }}
{{- end }}

{{- define "hybrid.index" -}}
- name: INDEX
  valueFrom: {fieldRef: {fieldPath: "metadata.labels['apps.kubernetes.io/pod-index']"}}
{{ include "hybrid.flower.env" . }}
{{- end }}

{{- define "hybrid.aggregator.containers" -}}
{{- $aggregator := .Values.aggregator -}}
{{- $fleet := printf "/workspace/fleets/%s" .Values.aggregator.fleet -}}
- name: aggregator
  {{- include "hybrid.container" (dict "top" . "values" $aggregator "role" "training" "env" (include "hybrid.index" .) "mounts" (include "hybrid.aggregator.mounts" .)) | nindent 2 }}
  command: [python, -m, hybrid.federation.checkin]
  args:
    - "--settings={{ $fleet }}/aggregator.json"
    - "--folder=/data/{{ .Values.aggregator.fleet }}"
    - --keys=/etc/hybrid/keys
    - --token=/etc/hybrid/own/token
    {{- if $aggregator.issuerToken.existingSecret }}
    - --issuer-token=/etc/hybrid/issuer/token
    {{- end }}
    - "--host={{ .Values.listen }}"
    - --port=8090
    {{- if $aggregator.tls.existingSecret }}
    - --tls-cert=/etc/hybrid/tls/tls.crt
    - --tls-key=/etc/hybrid/tls/tls.key
    {{- end }}
    - --control-port=8091 # of this pod alone
    {{- with $aggregator.extraArgs }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  ports:
    - {name: devices, containerPort: 8090}
  startupProbe:
    httpGet: &health {path: /health, port: devices{{ if $aggregator.tls.existingSecret }}, scheme: HTTPS{{ end }}}
    periodSeconds: 2
    failureThreshold: 90
  readinessProbe:
    httpGet: *health
    periodSeconds: 5
    timeoutSeconds: 3
  livenessProbe:
    httpGet: *health
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 6
- name: supernode
  {{- include "hybrid.container" (dict "top" . "values" $aggregator "resources" $aggregator.supernode.resources "role" "training" "env" (include "hybrid.index" .) "mounts" (include "hybrid.supernode.mounts" .)) | nindent 2 }}
  command: [python, -m, hybrid.local, supernode]
  args:
    - "--superlink={{ $aggregator.superlink | default (printf "%s:8095" (include "hybrid.at" (list . "superlink"))) }}"
    - --root-certificates=/etc/hybrid/superlink-ca/ca.crt
    - --auth-supernode-private-key=/etc/hybrid/own/node
    - --host=127.0.0.1
    - --port=8097
    - --ssl-certfile=/etc/hybrid/runtime/runtime.crt
    - --ssl-keyfile=/etc/hybrid/runtime/runtime.key
    - --ssl-ca-certfile=/etc/hybrid/superlink-ca/ca.crt
    - --isolation=process
    - --superexec-auth-secret-file=/etc/hybrid/runtime/superexec
    - --node-config=aggregator="http://127.0.0.1:8091" token="/etc/hybrid/own/token"
    - "--health-server-address={{ include "hybrid.listen" . }}:8098"
  ports:
    - {name: health, containerPort: 8098}
  startupProbe:
    grpc: {port: 8098}
    periodSeconds: 2
    failureThreshold: 90
  livenessProbe:
    grpc: {port: 8098}
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 6
- name: apps # starts a ClientApp for each message
  {{- include "hybrid.container" (dict "top" . "values" $aggregator "resources" $aggregator.apps.resources "role" "training" "env" (include "hybrid.index" .) "mounts" (include "hybrid.supernode.mounts" .)) | nindent 2 }}
  command: [python, -m, hybrid.local, superexec]
  args:
    - --runtime-api-address=127.0.0.1:8097
    - --root-certificates=/etc/hybrid/superlink-ca/ca.crt
    - --superexec-auth-secret-file=/etc/hybrid/runtime/superexec
{{- end }}

{{- define "hybrid.aggregator.mounts" -}}
- {name: data, mountPath: /data}
{{ include "hybrid.folder" (list "fleets" "ro") }}
- {name: keys, mountPath: /etc/hybrid/keys, readOnly: true}
- {name: own, mountPath: /etc/hybrid/own, subPathExpr: $(INDEX), readOnly: true}
{{- if .Values.aggregator.tls.existingSecret }}
- {name: tls, mountPath: /etc/hybrid/tls, readOnly: true}
{{- end }}
{{- if .Values.aggregator.issuerToken.existingSecret }}
- {name: issuer, mountPath: /etc/hybrid/issuer, readOnly: true}
{{- if .Values.issuer.enabled }}
- {name: issuer-ca, mountPath: /etc/hybrid/issuer-ca, readOnly: true}
{{- end }}
{{- end }}
{{- end }}

{{/* Of what speaks to Flower: neither the signing key nor a ledger. */}}
{{- define "hybrid.supernode.mounts" -}}
- {name: own, mountPath: /etc/hybrid/own, subPathExpr: $(INDEX), readOnly: true}
- {name: runtime, mountPath: /etc/hybrid/runtime, readOnly: true}
- {name: superlink-ca, mountPath: /etc/hybrid/superlink-ca, readOnly: true}
{{- end }}

{{- define "hybrid.aggregator.volumes" -}}
{{ include "hybrid.workspaceVolume" . }}
{{ include "hybrid.secretVolume" (dict "name" "keys" "secret" .Values.keys.existingSecret) }}
{{- /* Of each aggregator a folder, of which its pod sees its own alone. */ -}}
{{- $own := dict }}
{{- range $index := until (int .Values.aggregator.replicas) }}
{{- range list "node" "token" }}{{ $_ := set $own (printf "%s-%d" . $index) (printf "%d/%s" $index .) }}{{ end }}
{{- end }}
{{ include "hybrid.secretVolume" (dict "name" "own" "secret" .Values.aggregator.existingSecret "items" $own) }}
{{ include "hybrid.secretVolume" (dict "name" "runtime" "secret" .Values.aggregator.existingSecret "items" (dict "superexec" "superexec" "runtime.crt" "runtime.crt" "runtime.key" "runtime.key")) }}
{{ include "hybrid.secretVolume" (dict "name" "superlink-ca" "secret" .Values.superlink.tls.existingSecret "items" (dict "ca.crt" "ca.crt")) }}
{{- with .Values.aggregator.tls.existingSecret }}
{{ include "hybrid.secretVolume" (dict "name" "tls" "secret" .) }}
{{- end }}
{{- with .Values.aggregator.issuerToken.existingSecret }}
{{ include "hybrid.secretVolume" (dict "name" "issuer" "secret" . "items" (dict "token" "token")) }}
{{- if $.Values.issuer.enabled }}
{{- /* Without its ca.crt a public authority has signed it. */}}
{{ include "hybrid.secretVolume" (dict "name" "issuer-ca" "secret" $.Values.issuer.tls.existingSecret "items" (dict "ca.crt" "ca.crt") "optional" true) }}
{{- end }}
{{- end }}
{{- end }}

{{/* (list $ values): the volume of a pod that keeps what it has to itself. */}}
{{- define "hybrid.data" -}}
- metadata: {name: data}
  spec:
    accessModes: [ReadWriteOnce]
    {{- with (index . 1).persistence.storageClassName }}
    storageClassName: {{ . }}
    {{- end }}
    resources: {requests: {storage: {{ (index . 1).persistence.size }}}}
{{- end }}
