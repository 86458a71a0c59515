{{- define "hybrid.console.container" -}}
{{- $console := .Values.console -}}
- name: console
  {{- include "hybrid.container" (dict "top" . "values" $console "role" "control" "env" (include "hybrid.controlEnv" .) "mounts" (include "hybrid.console.mounts" . | trim)) | nindent 2 }}
  command: [hybrid, console]
  args:
    - "--host={{ .Values.listen }}"
    - --port=18010
    {{- range $console.names }}
    - "--name={{ . }}"
    {{- end }}
    - --certificate=/etc/hybrid/tls/tls.crt
    - --key=/etc/hybrid/tls/tls.key
    - --password-file=/etc/hybrid/console/password
    {{- if .Values.gateway.enabled }}
    - "--metrics=http://{{ include "hybrid.at" (list . "gateway-pods") }}:18003/metrics"
    {{- end }}
    {{- if .Values.worker.enabled }}
    - "--metrics=http://{{ include "hybrid.at" (list . "worker-pods") }}:18004/metrics"
    {{- end }}
    {{- with $console.extraArgs }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  ports:
    - {name: https, containerPort: 18010}
  startupProbe:
    tcpSocket: {port: https} # what it serves is for those who logged in, by the name that they use
    periodSeconds: 2
    failureThreshold: 60
  readinessProbe:
    tcpSocket: {port: https}
    periodSeconds: 5
  livenessProbe:
    tcpSocket: {port: https}
    periodSeconds: 10
    failureThreshold: 6
{{- end }}

{{- define "hybrid.console.mounts" -}}
{{ include "hybrid.controlMounts" (list . "console") | trim }}
- {name: tls, mountPath: /etc/hybrid/tls, readOnly: true}
- {name: console, mountPath: /etc/hybrid/console, readOnly: true}
{{- end }}

{{- define "hybrid.console.volumes" -}}
{{ include "hybrid.controlVolumes" (list . "console") | trim }}
{{- with .Values.console }}
{{ include "hybrid.secretVolume" (dict "name" "tls" "secret" .tls.existingSecret) }}
{{ include "hybrid.secretVolume" (dict "name" "console" "secret" .password.existingSecret "items" (dict .password.key "password")) }}
{{- end }}
{{- end }}
