{{- define "hybrid.worker.mounts" -}}
{{ include "hybrid.folder" (list ".hybrid/deployments" "ro") }}
{{ include "hybrid.folder" (list ".hybrid/feast" (include "hybrid.redis" . | empty | ternary "rw" "ro")) }}
{{- if .Values.worker.logSample }}
{{ include "hybrid.folder" (list ".hybrid/request-log" "rw") }}
{{- end }}
{{- if .Values.serving.deadLetters.existingSecret }}
- name: dead-letters
  mountPath: /etc/hybrid/dead-letters
  readOnly: true
{{- end }}
{{ include "hybrid.connectionMounts" (list . "worker") | trim }}
{{- end }}

{{- define "hybrid.worker.volumes" -}}
{{ include "hybrid.workspaceVolume" . }}
{{- with .Values.serving.deadLetters }}
{{- if .existingSecret }}
{{ include "hybrid.secretVolume" (dict "name" "dead-letters" "secret" .existingSecret "items" (dict .key "dead-letters.pub")) }}
{{- end }}
{{- end }}
{{ include "hybrid.connectionVolumes" (list . "worker") | trim }}
{{- end }}

{{- define "hybrid.worker.container" -}}
{{- $worker := .Values.worker }}
- name: worker
  {{- include "hybrid.container" (dict "top" . "values" $worker "role" "serving" "env" (include "hybrid.podName" .) "mounts" (include "hybrid.worker.mounts" .)) | nindent 2 }}
  command: [python, -m, serving, worker]
  args:
    - --deployments=/workspace/.hybrid/deployments
    - --feast=/workspace/.hybrid/feast
    {{- include "hybrid.kafkaArgs" . | trim | nindent 4 }}
    - "--kafka-partitions={{ .Values.kafka.partitions }}"
    {{- include "hybrid.tritonArgs" . | trim | nindent 4 }}
    - "--metrics-host={{ .Values.listen }}"
    - --metrics-port=18004
    - "--batch-ms={{ $worker.batchMilliseconds }}"
    - "--cache-mb={{ $worker.cacheMegabytes }}"
    - "--deadline-s={{ .Values.serving.deadlineSeconds }}"
    {{- if .Values.serving.exactlyOnce }}
    - --exactly-once
    - --instance=$(POD_NAME)
    {{- end }}
    {{- if .Values.serving.deadLetters.existingSecret }}
    - --dead-letter-key=/etc/hybrid/dead-letters/dead-letters.pub
    {{- end }}
    {{- if $worker.logSample }}
    - "--log-sample={{ $worker.logSample }}"
    - --log=/workspace/.hybrid/request-log
    {{- end }}
    {{- with $worker.extraArgs }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  ports:
    - {name: metrics, containerPort: 18004}
  startupProbe: # Feast is imported, which takes seconds
    httpGet: {path: /health/live, port: metrics}
    periodSeconds: 2
    failureThreshold: 90
  readinessProbe:
    httpGet: {path: /health/ready, port: metrics}
    periodSeconds: 5
    timeoutSeconds: 3
  livenessProbe:
    httpGet: {path: /health/live, port: metrics}
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 6
{{- end }}
