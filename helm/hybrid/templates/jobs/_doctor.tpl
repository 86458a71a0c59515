{{- define "hybrid.doctor.args" -}}
{{- if include "hybrid.kafka" . }}
{{ include "hybrid.kafkaArgs" . | trim }}
{{- end }}
{{- if or .Values.triton.enabled .Values.triton.address }}
{{ include "hybrid.tritonArgs" . | trim }}
{{- end }}
{{- if and .Values.gateway.enabled (not .Values.gateway.tls.clientCa) }}
- "--gateway={{ .Values.gateway.tls.existingSecret | empty | ternary "http" "https" }}://{{ include "hybrid.at" (list . "gateway") }}:{{ .Values.gateway.service.port }}"
{{- end }}
{{- if .Values.superlink.enabled }}
- "--superlink={{ include "hybrid.at" (list . "superlink") }}:8095"
{{- end }}
{{- if .Values.aggregator.enabled }}
{{- range $index := until (int .Values.aggregator.replicas) }}
- "--aggregator={{ $.Values.aggregator.tls.existingSecret | empty | ternary "http" "https" }}://{{ include "hybrid.at" (list $ (printf "aggregator-%d" $index)) }}:8090"
{{- end }}
{{- end }}
{{- if .Values.issuer.enabled }}
- "--issuer=https://{{ include "hybrid.at" (list . "issuer") }}:8092"
{{- end }}
{{- if .Values.doctor.ca.existingSecret }}
- --ca=/etc/hybrid/ca/ca.crt
{{- end }}
{{- with .Values.doctor.extraArgs }}
{{ toYaml . }}
{{- end }}
{{- end }}
