{{- define "hybrid.start.container" -}}
- name: start
  {{- include "hybrid.container" (dict "top" . "values" .Values.superlink "resources" .Values.superlink.apps.resources "role" "training" "env" (include "hybrid.flower.env" .) "mounts" (include "hybrid.start.mounts" .)) | nindent 2 }}
  command: [python, -m, hybrid.federation.start]
  args:
    - "--superlink={{ include "hybrid.at" (list . "superlink") }}:8095"
    - --authority=/etc/hybrid/superlink-ca/ca.crt
    - "--job=/workspace/fleets/{{ .Values.aggregator.fleet }}/job"
    {{- range $index := until (int .Values.aggregator.replicas) }}
    - "--node=/etc/hybrid/nodes/node-{{ $index }}.pub"
    {{- end }}
{{- end }}

{{- define "hybrid.start.mounts" -}}
{{ include "hybrid.folder" (list "fleets" "ro") }}
- {name: superlink-ca, mountPath: /etc/hybrid/superlink-ca, readOnly: true}
- {name: nodes, mountPath: /etc/hybrid/nodes, readOnly: true}
{{- end }}

{{- define "hybrid.start.volumes" -}}
{{ include "hybrid.workspaceVolume" . }}
{{ include "hybrid.secretVolume" (dict "name" "superlink-ca" "secret" .Values.superlink.tls.existingSecret "items" (dict "ca.crt" "ca.crt")) }}
{{- $items := dict }}
{{- range $index := until (int .Values.aggregator.replicas) }}
{{- $_ := set $items (printf "node-%d.pub" $index) (printf "node-%d.pub" $index) }}
{{- end }}
{{ include "hybrid.secretVolume" (dict "name" "nodes" "secret" .Values.aggregator.existingSecret "items" $items) }}
{{- end }}
