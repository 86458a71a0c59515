{{- define "hybrid.issuer.container" -}}
{{- $issuer := .Values.issuer -}}
- name: issuer
  {{- include "hybrid.container" (dict "top" . "values" $issuer "role" "serving" "mounts" (include "hybrid.issuer.mounts" .)) | nindent 2 }}
  command: [python, -m, serving.issuer]
  args:
    - --folder=/data/issuer
    - --api-keys=/etc/hybrid/api-keys/keys
    - --token=/etc/hybrid/control/token
    {{- with $issuer.requestsPerSecond }}
    - "--requests-per-s={{ . }}"
    {{- end }}
    - "--host={{ .Values.listen }}"
    - --port=8092
    - --tls-cert=/etc/hybrid/tls/tls.crt
    - --tls-key=/etc/hybrid/tls/tls.key
    - "--control-host={{ .Values.listen }}"
    - --control-port=8093
    - --control-tls-cert=/etc/hybrid/tls/tls.crt
    - --control-tls-key=/etc/hybrid/tls/tls.key
    {{- with $issuer.extraArgs }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  ports:
    - {name: devices, containerPort: 8092}
    - {name: control, containerPort: 8093}
  startupProbe:
    httpGet: {path: /health, port: devices, scheme: HTTPS}
    periodSeconds: 2
    failureThreshold: 60
  readinessProbe:
    httpGet: {path: /health, port: devices, scheme: HTTPS}
    periodSeconds: 5
    timeoutSeconds: 3
  livenessProbe:
    httpGet: {path: /health, port: devices, scheme: HTTPS}
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 6
  {{- include "hybrid.drain" 5 | nindent 2 }}
{{- end }}

{{- define "hybrid.issuer.mounts" -}}
- {name: data, mountPath: /data}
- {name: api-keys, mountPath: /etc/hybrid/api-keys, readOnly: true}
- {name: control, mountPath: /etc/hybrid/control, readOnly: true}
- {name: tls, mountPath: /etc/hybrid/tls, readOnly: true}
{{- end }}

{{- define "hybrid.issuer.volumes" -}}
{{- with .Values.issuer -}}
{{ include "hybrid.secretVolume" (dict "name" "api-keys" "secret" .apiKeys.existingSecret "items" (dict .apiKeys.key "keys")) }}
{{ include "hybrid.secretVolume" (dict "name" "control" "secret" .token.existingSecret "items" (dict "token" "token")) }}
{{ include "hybrid.secretVolume" (dict "name" "tls" "secret" .tls.existingSecret) }}
{{- end }}
{{- end }}
