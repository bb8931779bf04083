{{/* What several templates say alike. */}}

{{- define "mailfleet.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* A process type as a part of a name: Kubernetes' names have no underscore. */}}
{{- define "mailfleet.processName" -}}
{{- printf "%s-%s" (include "mailfleet.name" .root) (replace "_" "-" .type) -}}
{{- end -}}

{{- define "mailfleet.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "mailfleet.labels" -}}
{{ include "mailfleet.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "mailfleet.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Restricted, as the strictest of Kubernetes' pod security standards wants it. */}}
{{- define "mailfleet.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "mailfleet.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* The secrets that a process type needs, as NEEDED_BY of settings_sources.py says. Takes type; as JSON. */}}
{{- define "mailfleet.needed" -}}
{{- $needed := list "DATABASE_URL" -}}
{{- if ne .type "release" -}}
{{- $needed = concat $needed (list "RABBITMQ_URL" "REDIS_URL" "OTEL_EXPORTER_OTLP_HEADERS") -}}
{{- end -}}
{{- if not (has .type (list "release" "clock" "scheduler")) -}}
{{- $needed = append $needed "BACKUP_KEYS" -}}
{{- end -}}
{{- if has .type (list "send_plain" "send_attached" "backup" "maintenance") -}}
{{- $needed = append $needed "GRAPH_CLIENT_SECRET" -}}
{{- end -}}
{{- if eq .type "console" -}}
{{- $needed = append $needed "CONSOLE_TOKENS" -}}
{{- end -}}
{{- if eq .type "maintenance" -}}
{{- $needed = concat $needed (list "DEAD_LETTER_WEBHOOK_URL" "DEAD_LETTER_WEBHOOK_SECRET") -}}
{{- end -}}
{{- $needed | toJson -}}
{{- end -}}

{{/* Whether a process type talks to Graph and has the certificate. Takes root and type. */}}
{{- define "mailfleet.graphCertificate" -}}
{{- if and .root.Values.graphCertificate.existingSecret (has "GRAPH_CLIENT_SECRET" (include "mailfleet.needed" . | fromJsonArray)) -}}
yes
{{- end -}}
{{- end -}}

{{/* The account that a type's pods run as: the migrations run before there is anything else of the release. */}}
{{- define "mailfleet.serviceAccount" -}}
{{- if .root.Values.serviceAccount.existing -}}
{{- .root.Values.serviceAccount.existing -}}
{{- else -}}
{{- include "mailfleet.name" .root }}{{ eq .type "release" | ternary "-release" "" -}}
{{- end -}}
{{- end -}}

{{/* Whether a pod logs in to Vault with a token of its account, and has no other place for it. Takes root and process. */}}
{{- define "mailfleet.vaultToken" -}}
{{- $settings := mergeOverwrite (dict) .root.Values.settings (.process.settings | default dict) -}}
{{- if and $settings.VAULT_KUBERNETES_ROLE (not $settings.VAULT_KUBERNETES_TOKEN_PATH) -}}
yes
{{- end -}}
{{- end -}}

{{/* What the settings of any pod name besides the servers: the ports of Vault and of the receiver of traces, and whether
instance metadata is asked for a token. As JSON. */}}
{{- define "mailfleet.reached" -}}
{{- $ports := list -}}
{{- $metadata := .Values.networkPolicy.instanceMetadata -}}
{{- $every := list (.Values.migrations.settings | default dict) -}}
{{- range .Values.processes -}}
{{- $every = append $every (.settings | default dict) -}}
{{- end -}}
{{- $identity := get .Values.podLabels "azure.workload.identity/use" -}}
{{- range $every -}}
{{- $settings := mergeOverwrite (dict) $.Values.settings . -}}
{{- $store := $settings.SECRETS_FROM | default "" -}}
{{- range list (hasPrefix "vault://" $store | ternary $store "") ($settings.OTEL_EXPORTER_OTLP_ENDPOINT | default "") -}}
{{- if . -}}
{{- $named := regexFind ":[0-9]+$" (urlParse .).host | trimPrefix ":" -}}
{{- $ports = append $ports ($named | default (hasPrefix "http://" . | ternary "80" "443") | int) -}}
{{- end -}}
{{- end -}}
{{- if and (hasPrefix "azure-key-vault://" $store) (not $settings.AZURE_FEDERATED_TOKEN_FILE) (ne $identity "true") -}}
{{- $metadata = true -}}
{{- end -}}
{{- end -}}
{{- dict "ports" ($ports | uniq) "metadata" $metadata | toJson -}}
{{- end -}}

{{/* The variables of a container. Takes root, type, and process, the values of the type. */}}
{{- define "mailfleet.environment" -}}
env:
{{- $fixed := dict "PORT" "8000" "METRICS_PORT" "9191" -}}
{{- if eq (include "mailfleet.vaultToken" .) "yes" -}}
{{- $_ := set $fixed "VAULT_KUBERNETES_TOKEN_PATH" "/var/run/secrets/vault/token" -}}
{{- end -}}
{{- if eq (include "mailfleet.graphCertificate" .) "yes" -}}
{{- $_ := set $fixed "GRAPH_CLIENT_CERTIFICATE" "/etc/mailfleet/graph/certificate.pem" -}}
{{- end -}}
{{- $settings := mergeOverwrite (dict) .root.Values.settings (.process.settings | default dict) $fixed -}}
{{- range $name, $value := $settings }}
  - name: {{ $name }}
    value: {{ kindIs "float64" $value | ternary (printf "%v" (int64 $value)) (toString $value) | quote }}
{{- end }}
{{- $secretOf := .root.Values.secretOf -}}
{{- $secret := .process.existingSecret | default .root.Values.existingSecret -}}
{{- range $name := include "mailfleet.needed" . | fromJsonArray }}
{{- with get $secretOf $name | default $secret }}
  - name: {{ $name }}
    valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $name }}, optional: true}}
{{- end }}
{{- end }}
{{- with .process.wholeSecrets }}
envFrom:
{{- range . }}
  - secretRef: {name: {{ . }}}
{{- end }}
{{- end }}
{{- end -}}

{{/* Both take root, type and process. */}}
{{- define "mailfleet.mounts" -}}
volumeMounts:
  - {name: tmp, mountPath: /tmp}
{{- if eq (include "mailfleet.graphCertificate" .) "yes" }}
  - {name: graph-certificate, mountPath: /etc/mailfleet/graph, readOnly: true}
{{- end }}
{{- if eq (include "mailfleet.vaultToken" .) "yes" }}
  - {name: vault-token, mountPath: /var/run/secrets/vault, readOnly: true}
{{- end }}
{{- if .root.Values.attachments.existingClaim }}
  - {name: attachments, mountPath: /var/lib/mailfleet}
{{- end }}
{{- with concat .root.Values.extraVolumeMounts (.process.extraVolumeMounts | default list) }}
{{ toYaml . | indent 2 }}
{{- end }}
{{- end -}}

{{- define "mailfleet.volumes" -}}
volumes:
  # For the files in which a worker's processes add up their metrics.
  - name: tmp
    emptyDir: {sizeLimit: 128Mi}
{{- if eq (include "mailfleet.graphCertificate" .) "yes" }}
  - name: graph-certificate
    secret:
      secretName: {{ .root.Values.graphCertificate.existingSecret }}
      defaultMode: 0440
      items: [{key: {{ .root.Values.graphCertificate.key }}, path: certificate.pem}]
{{- end }}
{{- if eq (include "mailfleet.vaultToken" .) "yes" }}
  # Kubernetes renews it; Vault alone is shown it.
  - name: vault-token
    projected:
      defaultMode: 0440
      sources:
        - serviceAccountToken:
            path: token
            expirationSeconds: 3600
            {{- with .root.Values.serviceAccount.vaultAudience }}
            audience: {{ . }}
            {{- end }}
{{- end }}
{{- with .root.Values.attachments.existingClaim }}
  - name: attachments
    persistentVolumeClaim: {claimName: {{ . }}}
{{- end }}
{{- with concat .root.Values.extraVolumes (.process.extraVolumes | default list) }}
{{ toYaml . | indent 2 }}
{{- end }}
{{- end -}}
