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

{{/* (list $ "worker"): whom a component shows credentials; those of others it does not have. Training opens the feature store, and reads no row of it. */}}
{{- define "hybrid.shows" -}}
{{- $all := "kafka triton redis" -}}
{{- get (dict "gateway" ((index . 0).Values.gateway.direct | ternary $all "kafka") "console" "kafka redis" "migrate" "kafka redis" "materialize" "redis" "training" "redis") (index . 1) | default $all -}}
{{- end }}

{{- define "hybrid.connectionMounts" -}}
{{- $shows := include "hybrid.shows" . | splitList " " -}}
{{- with index . 0 }}
{{- if and (has "kafka" $shows) .Values.kafka.tls.enabled .Values.kafka.tls.existingSecret }}
- name: kafka-tls
  mountPath: /etc/hybrid/kafka-tls
  readOnly: true
{{- end }}
{{- if and (has "kafka" $shows) .Values.kafka.sasl.mechanism }}
- name: kafka-sasl
  mountPath: /etc/hybrid/kafka-sasl
  readOnly: true
{{- end }}
{{- if and (has "triton" $shows) .Values.triton.tls.enabled .Values.triton.tls.caKey }}
- name: triton-tls
  mountPath: /etc/hybrid/triton-tls
  readOnly: true
{{- end }}
{{- if and (has "redis" $shows) .Values.redis.existingSecret }}
- name: redis
  mountPath: /etc/hybrid/redis
  readOnly: true
{{- end }}
{{- end }}
{{- end }}

{{- define "hybrid.connectionVolumes" -}}
{{- $shows := include "hybrid.shows" . | splitList " " -}}
{{- with (index . 0).Values.kafka.tls }}
{{- if and (has "kafka" $shows) .enabled .existingSecret }}
{{- $items := dict }}
{{- if .caKey }}{{ $_ := set $items .caKey "ca.crt" }}{{ end }}
{{- if .certKey }}{{ $_ := set $items .certKey "tls.crt" }}{{ $_ := set $items .keyKey "tls.key" }}{{ end }}
{{ include "hybrid.secretVolume" (dict "name" "kafka-tls" "secret" .existingSecret "items" $items) }}
{{- end }}
{{- end }}
{{- with (index . 0).Values.kafka.sasl }}
{{- if and (has "kafka" $shows) .mechanism }}
{{ include "hybrid.secretVolume" (dict "name" "kafka-sasl" "secret" .existingSecret "items" (dict .passwordKey "password")) }}
{{- end }}
{{- end }}
{{- with (index . 0).Values.triton.tls }}
{{- if and (has "triton" $shows) .enabled .caKey }}
{{ include "hybrid.secretVolume" (dict "name" "triton-tls" "secret" .existingSecret "items" (dict .caKey "ca.crt")) }}
{{- end }}
{{- end }}
{{- with (index . 0).Values.redis }}
{{- if and (has "redis" $shows) .existingSecret }}
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
{{ include "hybrid.connectionMounts" . | trim }}
{{- end }}

{{- define "hybrid.controlVolumes" -}}
{{ include "hybrid.workspaceVolume" (index . 0) }}
{{- if include "hybrid.signs" . }}
{{ include "hybrid.secretVolume" (dict "name" "keys" "secret" (index . 0).Values.keys.existingSecret) }}
{{- end }}
{{ include "hybrid.connectionVolumes" . | trim }}
{{- end }}
