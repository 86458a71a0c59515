{{/* Every name and label of the chart comes from here. */}}

{{- define "hybrid.name" -}}
{{ default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* What the names of a release's objects begin with: short enough for a component and an ordinal behind it. */}}
{{- define "hybrid.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{ .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "hybrid.name" .) .Release.Name -}}
{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-%s" .Release.Name (include "hybrid.name" .) | trunc 40 | trimSuffix "-" }}
{{- end -}}
{{- end }}

{{/* (list $ "gateway"): the name of a component's objects. */}}
{{- define "hybrid.at" -}}
{{ printf "%s-%s" (include "hybrid.fullname" (index . 0)) (index . 1) }}
{{- end }}

{{/* (list $ "gateway"): what selects a component's pods; it never changes. */}}
{{- define "hybrid.selector" -}}
app.kubernetes.io/name: {{ include "hybrid.name" (index . 0) }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* (list $ "gateway"): labels of an object that is no pod: the chart's version among them, which pods do not have to restart for. */}}
{{- define "hybrid.labels" -}}
{{- $top := index . 0 -}}
{{ include "hybrid.selector" . }}
app.kubernetes.io/version: {{ $top.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: {{ include "hybrid.name" $top }}
app.kubernetes.io/managed-by: {{ $top.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $top.Chart.Name $top.Chart.Version | replace "+" "_" }}
{{- with $top.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* (list $ "gateway"): metadata of a component's object of that name; (list $ "migrate-1a2b" "migrate") of one among several. */}}
{{- define "hybrid.metadata" -}}
name: {{ include "hybrid.at" . }}
namespace: {{ (index . 0).Release.Namespace }}
labels:
  {{- include "hybrid.labels" (list (index . 0) (last .)) | nindent 2 }}
{{- end }}

{{/* (list $ "serving"): the image of a role; a digest, where one is given, in place of the tag. */}}
{{- define "hybrid.image" -}}
{{- $image := (index . 0).Values.image -}}
{{- $role := index . 1 -}}
{{- $digest := get $image.digests $role -}}
{{- $repository := printf "%s/%s-%s" ($image.registry | trimSuffix "/") $image.repository $role -}}
{{- if $digest -}}
{{ printf "%s@%s" $repository $digest }}
{{- else -}}
{{ printf "%s:%s" $repository ($image.tag | default (index . 0).Chart.AppVersion) }}
{{- end -}}
{{- end }}

{{/* An image of others: (dict "repository" "tag" "digest"). */}}
{{- define "hybrid.foreign" -}}
{{- if .digest }}{{ printf "%s@%s" .repository .digest }}{{ else }}{{ printf "%s:%s" .repository .tag }}{{ end -}}
{{- end }}

{{- define "hybrid.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (include "hybrid.fullname" .) }}
{{- end }}

{{- define "hybrid.claim" -}}
{{ .Values.workspace.existingClaim | default (include "hybrid.at" (list . "workspace")) }}
{{- end }}

{{/* Where Triton answers gRPC, as HOST:PORT: all its pods, over which clients spread their calls. */}}
{{- define "hybrid.triton" -}}
{{ .Values.triton.address | default (printf "%s:8001" (include "hybrid.at" (list . "triton-pods"))) }}
{{- end }}

{{/* Where MLflow answers; nothing: the registry is a file in the workspace. */}}
{{- define "hybrid.mlflow" -}}
{{- if .Values.mlflow.enabled -}}
{{ printf "http://%s:5000" (include "hybrid.at" (list . "mlflow")) }}
{{- else -}}
{{ .Values.mlflow.uri }}
{{- end -}}
{{- end }}

{{/* The address in front of a port: "::" needs brackets there. */}}
{{- define "hybrid.listen" -}}
{{- if contains ":" .Values.listen }}[{{ .Values.listen }}]{{ else }}{{ .Values.listen }}{{ end -}}
{{- end }}

{{- define "hybrid.kafka" -}}
{{- if .Values.trial.kafka.enabled }}{{ include "hybrid.at" (list . "kafka") }}:9092{{ else }}{{ .Values.kafka.bootstrap }}{{ end -}}
{{- end }}

{{- define "hybrid.redis" -}}
{{- if .Values.trial.redis.enabled }}{{ include "hybrid.at" (list . "redis") }}:6379{{ else }}{{ .Values.redis.address }}{{ end -}}
{{- end }}

{{/* The port at the end of HOST:PORT. */}}
{{- define "hybrid.port" -}}
{{ . | splitList ":" | last }}
{{- end }}

{{/* Of a URL. */}}
{{- define "hybrid.urlPort" -}}
{{- $host := (urlParse .).host -}}
{{- if contains ":" $host }}{{ $host | splitList ":" | last }}{{ else }}{{ hasPrefix "https:" . | ternary "443" "80" }}{{ end -}}
{{- end }}
