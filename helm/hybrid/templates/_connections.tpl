{{/* How processes reach Kafka, Redis and Triton: arguments, and the volumes with what they show. */}}

{{- define "hybrid.kafkaArgs" -}}
- "--kafka={{ include "hybrid.kafka" . }}"
{{- with .Values.kafka.tls }}
{{- if .enabled }}
- --kafka-tls
{{- if .existingSecret }}
{{- if .caKey }}
- --kafka-ca=/etc/hybrid/kafka-tls/ca.crt
{{- end }}
{{- if .certKey }}
- --kafka-cert=/etc/hybrid/kafka-tls/tls.crt
- --kafka-key=/etc/hybrid/kafka-tls/tls.key
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.kafka.sasl }}
{{- if .mechanism }}
- "--kafka-sasl={{ .mechanism }}"
- "--kafka-username={{ .username }}"
- --kafka-password-file=/etc/hybrid/kafka-sasl/password
{{- end }}
{{- end }}
{{- end }}

{{- define "hybrid.tritonArgs" -}}
- "--triton={{ include "hybrid.triton" . }}"
{{- with .Values.triton.tls }}
{{- if .enabled }}
- --triton-tls
{{- if .caKey }}
- --triton-ca=/etc/hybrid/triton-tls/ca.crt
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "hybrid.connectionMounts" -}}
{{- if and .Values.kafka.tls.enabled .Values.kafka.tls.existingSecret }}
- name: kafka-tls
  mountPath: /etc/hybrid/kafka-tls
  readOnly: true
{{- end }}
{{- if .Values.kafka.sasl.mechanism }}
- name: kafka-sasl
  mountPath: /etc/hybrid/kafka-sasl
  readOnly: true
{{- end }}
{{- if and .Values.triton.tls.enabled .Values.triton.tls.caKey }}
- name: triton-tls
  mountPath: /etc/hybrid/triton-tls
  readOnly: true
{{- end }}
{{- if .Values.redis.existingSecret }}
- name: redis
  mountPath: /etc/hybrid/redis
  readOnly: true
{{- end }}
{{- end }}

{{- define "hybrid.connectionVolumes" -}}
{{- with .Values.kafka.tls }}
{{- if and .enabled .existingSecret }}
{{- $items := dict }}
{{- if .caKey }}{{ $_ := set $items .caKey "ca.crt" }}{{ end }}
{{- if .certKey }}{{ $_ := set $items .certKey "tls.crt" }}{{ $_ := set $items .keyKey "tls.key" }}{{ end }}
{{ include "hybrid.secretVolume" (dict "name" "kafka-tls" "secret" .existingSecret "items" $items) }}
{{- end }}
{{- end }}
{{- with .Values.kafka.sasl }}
{{- if .mechanism }}
{{ include "hybrid.secretVolume" (dict "name" "kafka-sasl" "secret" .existingSecret "items" (dict .passwordKey "password")) }}
{{- end }}
{{- end }}
{{- with .Values.triton.tls }}
{{- if and .enabled .caKey }}
{{ include "hybrid.secretVolume" (dict "name" "triton-tls" "secret" .existingSecret "items" (dict .caKey "ca.crt")) }}
{{- end }}
{{- end }}
{{- with .Values.redis }}
{{- if .existingSecret }}
{{ include "hybrid.secretVolume" (dict "name" "redis" "secret" .existingSecret "items" (dict .passwordKey "password")) }}
{{- end }}
{{- end }}
{{- end }}

{{/* Of what works in the whole workspace. */}}
{{- define "hybrid.controlEnv" -}}
- name: HYBRID_HOME
  value: /workspace/.hybrid
- name: HYBRID_TRITON_BACKEND
  value: {{ .Values.triton.backend }}
{{- if .Values.triton.enabled }}
- name: HYBRID_TRITON
  value: http://{{ include "hybrid.at" (list . "triton-pods") }}:8000
{{- end }}
{{- with include "hybrid.mlflow" . }}
- name: MLFLOW_TRACKING_URI
  value: {{ . | quote }}
{{- end }}
{{- with .Values.mlflow.existingSecret }}
- name: MLFLOW_TRACKING_USERNAME
  valueFrom: {secretKeyRef: {name: {{ . }}, key: username}}
- name: MLFLOW_TRACKING_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ . }}, key: password}}
{{- end }}
{{- end }}

{{/* (list $ "console"): the signing key is for what signs, and for the doctor, who looks at it. */}}
{{- define "hybrid.signs" -}}
{{- if and (index . 0).Values.keys.existingSecret (has (index . 1) (list "console" "training" "doctor")) }}yes{{ end -}}
{{- end }}

{{- define "hybrid.controlMounts" -}}
- name: workspace
  mountPath: /workspace
{{- if include "hybrid.signs" . }}
- name: keys
  mountPath: /workspace/.hybrid/keys
  readOnly: true
{{- end }}
{{ include "hybrid.connectionMounts" (index . 0) | trim }}
{{- end }}

{{- define "hybrid.controlVolumes" -}}
{{ include "hybrid.workspaceVolume" (index . 0) }}
{{- if include "hybrid.signs" . }}
{{ include "hybrid.secretVolume" (dict "name" "keys" "secret" (index . 0).Values.keys.existingSecret) }}
{{- end }}
{{ include "hybrid.connectionVolumes" (index . 0) | trim }}
{{- end }}
