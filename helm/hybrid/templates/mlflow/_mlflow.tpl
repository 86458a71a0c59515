{{- define "hybrid.mlflow.container" -}}
{{- $mlflow := .Values.mlflow -}}
{{- $at := include "hybrid.at" (list . "mlflow") -}}
- name: mlflow
  {{- include "hybrid.container" (dict "top" . "values" $mlflow "role" "control" "env" (include "hybrid.mlflow.env" .) "mounts" (include "hybrid.folder" (list ".hybrid/mlflow" "rw"))) | nindent 2 }}
  command: [mlflow, server]
  args:
    - "--host={{ .Values.listen }}"
    - --port=5000
    - "--workers={{ $mlflow.workers }}"
    - --uvicorn-opts=--timeout-worker-healthcheck=120 # each imports for seconds, in which it would be taken for dead after five
    - "--allowed-hosts={{ $at }}:5000,{{ $at }}.{{ .Release.Namespace }}:5000,localhost:5000"
    - --serve-artifacts
    - "--artifacts-destination={{ $mlflow.artifacts | default "/workspace/.hybrid/mlflow/artifacts" }}"
    {{- with $mlflow.extraArgs }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  ports:
    - {name: http, containerPort: 5000}
  startupProbe:
    httpGet: &health {path: /health, port: http, httpHeaders: [{name: Host, value: "localhost:5000"}]}
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
{{- end }}

{{- define "hybrid.mlflow.env" -}}
{{- $mlflow := .Values.mlflow -}}
- name: MLFLOW_BACKEND_STORE_URI
  {{- if $mlflow.database.existingSecret }}
  valueFrom: {secretKeyRef: {name: {{ $mlflow.database.existingSecret }}, key: {{ $mlflow.database.key }}}}
  {{- else }}
  value: sqlite:////workspace/.hybrid/mlflow/server.db
  {{- end }}
- name: MLFLOW_DISABLE_TELEMETRY
  value: "true"
- name: MLFLOW_SERVER_ENABLE_JOB_EXECUTION # evaluations that it would run itself
  value: "false"
{{- end }}
