{{/*
A pod's template, from (dict
  "top" $, "name" component, "values" of the component,
  "containers" text, "volumes" text, "init" text,
  "grace" seconds). The chart writes nothing that containers read at their start but their arguments, so no checksum is needed.
*/}}
{{- define "hybrid.pod" -}}
{{- $values := .values -}}
metadata:
  labels:
    {{- include "hybrid.selector" (list .top .name) | nindent 4 }}
    {{- with merge (deepCopy (default dict $values.podLabels)) .top.Values.commonLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "hybrid.serviceAccount" .top }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- with .top.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- toYaml .top.Values.podSecurityContext | nindent 4 }}
  {{- with .restart }}
  restartPolicy: {{ . }}
  {{- end }}
  terminationGracePeriodSeconds: {{ .grace | default 30 }}
  {{- with $values.priorityClassName | default .top.Values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $values.nodeSelector | default .top.Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.tolerations | default .top.Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if $values.topologySpread }}
  topologySpreadConstraints:
    {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
    - maxSkew: 1
      topologyKey: {{ . }}
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "hybrid.selector" (list $.top $.name) | nindent 10 }}
    {{- end }}
  {{- end }}
  {{- if or .init $values.initContainers }}
  initContainers:
    {{- with .init }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- with $values.initContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
  containers:
    {{- .containers | nindent 4 }}
    {{- with $values.extraContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  volumes:
    - name: tmp
      emptyDir: {sizeLimit: {{ .top.Values.tmpSize }}}
    {{- with .volumes }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- with $values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}

{{/* What every container of ours has, from (dict "top" $ "values" of the component "role" image "env" text "mounts" text). */}}
{{- define "hybrid.container" -}}
image: {{ include "hybrid.image" (list .top .role) }}
imagePullPolicy: {{ .top.Values.image.pullPolicy }}
securityContext:
  {{- toYaml .top.Values.containerSecurityContext | nindent 2 }}
env:
  - name: PYTHONUNBUFFERED
    value: "1"
  - name: HOME
    value: /tmp
  {{- with .env }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with .top.Values.tracing.endpoint }}
  - name: OTEL_EXPORTER_OTLP_ENDPOINT
    value: {{ . | quote }}
  - name: OTEL_TRACES_SAMPLER
    value: parentbased_traceidratio
  - name: OTEL_TRACES_SAMPLER_ARG
    value: {{ $.top.Values.tracing.share | quote }}
  {{- end }}
  {{- with .values.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .values.extraEnvFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .resources | default .values.resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
volumeMounts:
  - name: tmp
    mountPath: /tmp
  {{- with .mounts }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with .values.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{/* Waits until Services and load balancers have taken the pod out, before the process is told to end. */}}
{{- define "hybrid.drain" -}}
lifecycle:
  preStop:
    exec:
      command: [sleep, {{ . | quote }}]
{{- end }}

{{/* (dict "name" volume "secret" name "items" {key: file} "optional" whether it may lack them): a secret that root's group may read. */}}
{{- define "hybrid.secretVolume" -}}
- name: {{ .name }}
  secret:
    secretName: {{ .secret }}
    defaultMode: 0440
    {{- with .optional }}
    optional: true
    {{- end }}
    {{- with .items }}
    items:
      {{- range $key, $path := . }}
      - key: {{ $key }}
        path: {{ $path }}
      {{- end }}
    {{- end }}
{{- end }}

{{/* (list "deployments" "ro"): one folder of the workspace, and nothing beside it: people's data are there, too. */}}
{{- define "hybrid.folder" -}}
- {name: workspace, mountPath: /workspace/{{ index . 0 }}, subPath: {{ index . 0 }}{{ if eq (index . 1) "ro" }}, readOnly: true{{ end }}}
{{- end }}

{{/* (list $ values "a" "b"): makes folders of the workspace that are not there; else a kubelet makes them, as root's. */}}
{{- define "hybrid.folders" -}}
{{- $top := index . 0 -}}
- name: folders
  {{- include "hybrid.container" (dict "top" $top "values" (dict "resources" (dict "requests" (dict "cpu" "10m" "memory" "16Mi") "limits" (dict "memory" "64Mi"))) "role" "serving" "mounts" "- {name: workspace, mountPath: /workspace}") | nindent 2 }}
  command: [sh, -c, 'umask 0007 && exec mkdir --parents "$@"', folders]
  args:
    {{- range slice . 1 }}
    - /workspace/{{ . }}
    {{- end }}
{{- end }}

{{- define "hybrid.workspaceVolume" -}}
- name: workspace
  persistentVolumeClaim:
    claimName: {{ include "hybrid.claim" . }}
{{- end }}
