{{/* (list $ component whether): how many of its pods may be away at once, where there are several. */}}
{{- define "hybrid.budget" -}}
{{- if index . 2 }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  {{- include "hybrid.metadata" (list (index . 0) (index . 1)) | nindent 2 }}
spec:
  maxUnavailable: 1
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "hybrid.selector" . | nindent 6 }}
{{- end }}
{{- end }}
