{{- define "hybrid.podName" -}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
{{- end }}

{{/* Where clients must show a certificate a kubelet cannot, so it only connects. */}}
{{- define "hybrid.gateway.probe" -}}
{{- if .gateway.tls.clientCa -}}
tcpSocket: {port: http}
{{- else -}}
httpGet: {path: /v2/health/{{ .path }}, port: http{{ if .gateway.tls.existingSecret }}, scheme: HTTPS{{ end }}}
{{- end -}}
{{- end }}

{{- define "hybrid.gateway.mounts" -}}
{{ include "hybrid.folder" (list ".hybrid/deployments" "ro") }}
{{ include "hybrid.folder" (list ".hybrid/bundles" "ro") }}
{{- if .Values.gateway.direct }}
{{ include "hybrid.folder" (list ".hybrid/feast" (include "hybrid.redis" . | empty | ternary "rw" "ro")) }}
{{- end }}
{{- if .Values.gateway.results.enabled }}
{{ include "hybrid.folder" (list ".hybrid/results" "rw") }}
{{- end }}
{{- if .Values.gateway.auth.apiKeys.existingSecret }}
- name: api-keys
  mountPath: /etc/hybrid/api-keys
  readOnly: true
{{- end }}
{{- if .Values.gateway.tls.existingSecret }}
- name: tls
  mountPath: /etc/hybrid/tls
  readOnly: true
{{- end }}
{{- if .Values.serving.deadLetters.existingSecret }}
- name: dead-letters
  mountPath: /etc/hybrid/dead-letters
  readOnly: true
{{- end }}
{{ include "hybrid.connectionMounts" (list . "gateway") | trim }}
{{- end }}

{{- define "hybrid.gateway.volumes" -}}
{{ include "hybrid.workspaceVolume" . }}
{{- with .Values.gateway.auth.apiKeys }}
{{- if .existingSecret }}
{{ include "hybrid.secretVolume" (dict "name" "api-keys" "secret" .existingSecret "items" (dict .key "keys")) }}
{{- end }}
{{- end }}
{{- with .Values.gateway.tls.existingSecret }}
{{ include "hybrid.secretVolume" (dict "name" "tls" "secret" .) }}
{{- end }}
{{- with .Values.serving.deadLetters }}
{{- if .existingSecret }}
{{ include "hybrid.secretVolume" (dict "name" "dead-letters" "secret" .existingSecret "items" (dict .key "dead-letters.pub")) }}
{{- end }}
{{- end }}
{{ include "hybrid.connectionVolumes" (list . "gateway") | trim }}
{{- end }}

{{- define "hybrid.gateway.container" -}}
{{- $gateway := .Values.gateway }}
- name: gateway
  {{- include "hybrid.container" (dict "top" . "values" $gateway "role" "serving" "env" (include "hybrid.podName" .) "mounts" (include "hybrid.gateway.mounts" .)) | nindent 2 }}
  command: [python, -m, serving, gateway]
  args:
    - --deployments=/workspace/.hybrid/deployments
    - --bundles=/workspace/.hybrid/bundles
    {{- include "hybrid.kafkaArgs" . | trim | nindent 4 }}
    - "--kafka-partitions={{ .Values.kafka.partitions }}"
    - "--host={{ .Values.listen }}"
    - --port=8080
    {{- if $gateway.grpc }}
    - --grpc-port=8081
    {{- end }}
    - "--metrics-host={{ .Values.listen }}"
    - --metrics-port=18003
    - --reply-partition=from-hostname
    - "--processes={{ $gateway.processes }}"
    - "--deadline-s={{ .Values.serving.deadlineSeconds }}"
    {{- if .Values.serving.exactlyOnce }}
    - --exactly-once
    {{- end }}
    {{- if .Values.serving.deadLetters.existingSecret }}
    - --dead-letter-key=/etc/hybrid/dead-letters/dead-letters.pub
    {{- end }}
    {{- if $gateway.direct }}
    - --feast=/workspace/.hybrid/feast
    {{- include "hybrid.tritonArgs" . | trim | nindent 4 }}
    {{- end }}
    {{- if $gateway.results.enabled }}
    - --results=/workspace/.hybrid/results
    - "--results-s={{ $gateway.results.seconds }}"
    - "--results-mb={{ $gateway.results.megabytes }}"
    {{- end }}
    {{- with $gateway.auth }}
    {{- if .apiKeys.existingSecret }}
    - --api-keys=/etc/hybrid/api-keys/keys
    {{- end }}
    {{- if .jwt.issuer }}
    - "--jwt-issuer={{ .jwt.issuer }}"
    - "--jwt-audience={{ .jwt.audience }}"
    - "--jwt-keys={{ .jwt.keys }}"
    - "--jwt-algorithms={{ join "," .jwt.algorithms }}"
    {{- with .jwt.scope }}
    - "--jwt-scope={{ . }}"
    {{- end }}
    {{- end }}
    {{- end }}
    {{- with $gateway.rates.requestsPerSecond }}
    - "--requests-per-s={{ . }}"
    {{- end }}
    {{- with $gateway.rates.rowsPerSecond }}
    - "--rows-per-s={{ . }}"
    {{- end }}
    {{- if $gateway.tls.existingSecret }}
    - --tls-cert=/etc/hybrid/tls/tls.crt
    - --tls-key=/etc/hybrid/tls/tls.key
    {{- if $gateway.tls.clientCa }}
    - --tls-client-ca=/etc/hybrid/tls/ca.crt
    {{- end }}
    {{- end }}
    {{- with $gateway.extraArgs }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  ports:
    - {name: http, containerPort: 8080}
    {{- if $gateway.grpc }}
    - {name: grpc, containerPort: 8081}
    {{- end }}
    {{- range $number := until (int $gateway.processes) }}
    - {name: metrics{{ if $number }}-{{ $number }}{{ end }}, containerPort: {{ add 18003 $number }}}
    {{- end }}
  startupProbe:
    {{- include "hybrid.gateway.probe" (dict "gateway" $gateway "path" "live") | nindent 4 }}
    periodSeconds: 2
    failureThreshold: 60
  readinessProbe:
    {{- include "hybrid.gateway.probe" (dict "gateway" $gateway "path" "ready") | nindent 4 }}
    periodSeconds: 5
    timeoutSeconds: 3
  livenessProbe:
    {{- include "hybrid.gateway.probe" (dict "gateway" $gateway "path" "live") | nindent 4 }}
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 6
  {{- include "hybrid.drain" 5 | nindent 2 }}
{{- end }}
