{{- define "hybrid.triton.container" -}}
{{- $triton := .Values.triton -}}
- name: triton
  image: {{ include "hybrid.foreign" $triton.image }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  securityContext:
    {{- toYaml .Values.containerSecurityContext | nindent 4 }}
  command: [tritonserver]
  args:
    - "--model-repository={{ $triton.repository.url | default "/models" }}"
    - --model-control-mode=poll # what is promoted is served without a restart
    - "--repository-poll-secs={{ $triton.repository.pollSeconds }}"
    - --disable-auto-complete-config
    - "--http-address={{ .Values.listen }}"
    - --http-port=8000
    - "--grpc-address={{ .Values.listen }}"
    - --grpc-port=8001
    - --grpc-max-connection-age=300000 # then clients look for pods anew, and find those that came since
    - --grpc-max-connection-age-grace=30000
    - "--metrics-address={{ .Values.listen }}"
    - --metrics-port=8002
    - --exit-timeout-secs=30
    - --log-format=ISO8601
    {{- if $triton.tls.enabled }}
    - --grpc-use-ssl=1
    - --grpc-server-cert=/etc/hybrid/tls/tls.crt
    - --grpc-server-key=/etc/hybrid/tls/tls.key
    {{- end }}
    {{- with $triton.extraArgs }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- if or $triton.repository.existingSecret $triton.extraEnv }}
  env:
    {{- with $triton.repository.existingSecret }}
    - name: AWS_ACCESS_KEY_ID
      valueFrom: {secretKeyRef: {name: {{ . }}, key: access-key-id}}
    - name: AWS_SECRET_ACCESS_KEY
      valueFrom: {secretKeyRef: {name: {{ . }}, key: secret-access-key}}
    {{- end }}
    {{- with $triton.extraEnv }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
  ports:
    - {name: http, containerPort: 8000}
    - {name: grpc, containerPort: 8001}
    - {name: metrics, containerPort: 8002}
  startupProbe:
    httpGet: {path: /v2/health/live, port: http}
    periodSeconds: 2
    failureThreshold: 150
  readinessProbe:
    httpGet: {path: /v2/health/ready, port: http}
    periodSeconds: 5
    timeoutSeconds: 3
  livenessProbe:
    httpGet: {path: /v2/health/live, port: http}
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 6
  {{- include "hybrid.drain" 5 | nindent 2 }}
  {{- with $triton.resources }}
  resources:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    {{- if not $triton.repository.url }}
    - {name: workspace, mountPath: /models, subPath: .hybrid/triton, readOnly: true} # models alone
    {{- end }}
    {{- if $triton.tls.enabled }}
    - {name: tls, mountPath: /etc/hybrid/tls, readOnly: true}
    {{- end }}
    {{- with $triton.extraVolumeMounts }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}

{{- define "hybrid.triton.volumes" -}}
{{- if not .Values.triton.repository.url }}
{{ include "hybrid.workspaceVolume" . }}
{{- end }}
{{- with .Values.triton.tls }}
{{- if .enabled }}
{{ include "hybrid.secretVolume" (dict "name" "tls" "secret" .existingSecret) }}
{{- end }}
{{- end }}
{{- end }}
