{{- define "hybrid.migrate.args" -}}
{{- if include "hybrid.kafka" . }}
{{ include "hybrid.kafkaArgs" . | trim }}
- "--kafka-partitions={{ .Values.kafka.partitions }}"
{{- end }}
{{- end }}

{{/* Says where the features that serving reads lie, before anything is applied to them. */}}
{{- define "hybrid.store.container" -}}
{{- $redis := .Values.redis -}}
{{- $args := list "sqlite" -}}
{{- with include "hybrid.redis" . -}}
{{- $args = list "redis" (printf "--address=%s" .) (printf "--database=%d" (int $redis.database)) -}}
{{- if $redis.tls }}{{ $args = append $args "--tls" }}{{ end -}}
{{- with $redis.username }}{{ $args = append $args (printf "--username=%s" .) }}{{ end -}}
{{- if $redis.existingSecret }}{{ $args = append $args "--password-file=/etc/hybrid/redis/password" }}{{ end -}}
{{- end -}}
{{ include "hybrid.job.container" (dict "top" . "component" "migrate" "name" "store" "command" (list "hybrid" "features" "store") "args" $args "values" .Values.migrate) }}
{{- end }}
