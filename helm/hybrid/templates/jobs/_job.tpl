{{/* A command of the control plane in a pod: (dict "top" $ "name" container "command" list "args" list "values" of the job). */}}
{{- define "hybrid.job.container" -}}
- name: {{ .name }}
  {{- include "hybrid.container" (dict "top" .top "values" .values "role" "control" "env" (include "hybrid.controlEnv" .top) "mounts" (printf "%s%s" (include "hybrid.controlMounts" (list .top .component) | trim) (.mounts | default ""))) | nindent 2 }}
  command:
    {{- toYaml .command | nindent 4 }}
  args:
    {{- toYaml .args | nindent 4 }}
{{- end }}

{{/* (dict "top" $ "name" component "command" list "args" list "values" of the job "init" "mounts" "volumes" texts). */}}
{{- define "hybrid.job.pod" -}}
{{- include "hybrid.pod" (dict "top" .top "name" .component "values" .values "containers" (include "hybrid.job.container" .) "volumes" (printf "%s%s" (include "hybrid.controlVolumes" (list .top .component) | trim) (.volumes | default "")) "init" (printf "%s%s" (include "hybrid.folders" (list .top ".hybrid/keys" "runs" "fleets")) (.init | default "" | printf "\n%s")) "restart" "Never" "grace" 60) }}
{{- end }}
