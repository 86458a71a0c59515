{{- define "hybrid.trial.kafka" -}}
- name: kafka
  image: {{ include "hybrid.foreign" .Values.trial.kafka.image }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  securityContext:
    {{- toYaml (omit .Values.containerSecurityContext "readOnlyRootFilesystem") | nindent 4 }} # its image writes its configuration below /opt
  env:
    - {name: KAFKA_NODE_ID, value: "1"}
    - {name: KAFKA_PROCESS_ROLES, value: "broker,controller"}
    - {name: KAFKA_LISTENERS, value: "PLAINTEXT://:9092,CONTROLLER://:9093"}
    - {name: KAFKA_ADVERTISED_LISTENERS, value: "PLAINTEXT://{{ include "hybrid.at" (list . "kafka") }}:9092"}
    - {name: KAFKA_CONTROLLER_LISTENER_NAMES, value: CONTROLLER}
    - {name: KAFKA_CONTROLLER_QUORUM_VOTERS, value: "1@localhost:9093"}
    - {name: KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR, value: "1"}
    - {name: KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR, value: "1"}
    - {name: KAFKA_TRANSACTION_STATE_LOG_MIN_ISR, value: "1"}
    - {name: KAFKA_LOG_DIRS, value: /data}
  ports:
    - {name: kafka, containerPort: 9092}
  readinessProbe:
    tcpSocket: {port: kafka}
  livenessProbe:
    tcpSocket: {port: kafka}
    initialDelaySeconds: 60
  {{- with .Values.trial.kafka.resources }}
  resources:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: data, mountPath: /data}
{{- end }}

{{- define "hybrid.trial.redis" -}}
- name: redis
  image: {{ include "hybrid.foreign" .Values.trial.redis.image }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  securityContext:
    {{- toYaml .Values.containerSecurityContext | nindent 4 }}
  args: [--save, "", --appendonly, "no"]
  ports:
    - {name: redis, containerPort: 6379}
  readinessProbe:
    tcpSocket: {port: redis}
  livenessProbe:
    tcpSocket: {port: redis}
  {{- with .Values.trial.redis.resources }}
  resources:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: data, mountPath: /data}
{{- end }}
