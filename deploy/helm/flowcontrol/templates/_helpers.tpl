{{- define "flowcontrol.fullname" -}}
{{- if contains "flowcontrol" .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-flowcontrol{{ end -}}
{{- end }}

{{/*
Name of a pool's objects: one that a Service can have. A longer one is cut, and ends with a digest, so
that two pools do not share their objects. Of: root, pool.
*/}}
{{- define "flowcontrol.name" -}}
{{- $name := printf "%s-%s" (include "flowcontrol.fullname" .root) .pool.name | replace "." "-" }}
{{- if gt (len $name) 63 }}{{ $name = printf "%s-%s" ($name | trunc 54 | trimSuffix "-") ($name | sha256sum | trunc 8) }}{{ end }}
{{- $name }}
{{- end }}

{{/*
Fails where two pools would have the same objects, or routes that match every request of a gateway: one
of each would be lost.
*/}}
{{- define "flowcontrol.expectDistinct" -}}
{{- $seen := dict }}
{{- range $pool := .Values.pools }}
{{- $of := dict "root" $ "pool" $pool }}
{{- $own := include "flowcontrol.merged" $of | fromYaml }}
{{- $names := list (printf "objects called %s" (include "flowcontrol.name" $of)) }}
{{- if and $own.httpRoute.create (not $own.httpRoute.matches) }}
{{- $names = append $names (printf "every request of the gateway %s/%s: set httpRoute.matches" ($own.httpRoute.inferenceGatewayNamespace | default $.Release.Namespace) $own.httpRoute.inferenceGatewayName) }}
{{- end }}
{{- range $objective := $own.inferenceObjectives }}
{{- $names = append $names (printf "InferenceObjective %s of %s" $objective.name ($objective.apiVersion | default "llm-d.ai/v1alpha2")) }}
{{- end }}
{{- range $name := $names }}
{{- if hasKey $seen $name }}{{ fail (printf "pools[%s] and pools[%s] must not both have %s" (get $seen $name) $pool.name $name) }}{{ end }}
{{- $_ := set $seen $name $pool.name }}
{{- end }}
{{- end }}
{{- end }}

{{- define "flowcontrol.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}{{ .Values.serviceAccount.name | default (include "flowcontrol.fullname" .) }}
{{- else }}{{ required "serviceAccount.name must be set where serviceAccount.create is false" .Values.serviceAccount.name }}{{ end }}
{{- end }}

{{- define "flowcontrol.adminSecret" -}}
{{ .Values.admin.existingSecret | default (printf "%s-admin" (include "flowcontrol.fullname" .)) }}
{{- end }}

{{- define "flowcontrol.image" -}}
{{- with .Values.image }}{{ if .registry }}{{ .registry }}/{{ end }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ end -}}
{{- end }}

{{/* Labels of everything. Of: root. */}}
{{- define "flowcontrol.labels" -}}
app.kubernetes.io/name: flowcontrol
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* Labels that select a pool's pods. Of: root, pool. */}}
{{- define "flowcontrol.selector" -}}
app.kubernetes.io/name: flowcontrol
app.kubernetes.io/instance: {{ .root.Release.Name }}
flowcontrol/pool: {{ .pool.name }}
{{- end }}

{{/* A pool's own value, merged over the top level's: of the keys that a pool may set. As YAML. */}}
{{- define "flowcontrol.merged" -}}
{{- $own := dict }}
{{- range $key := list "inferencePool" "httpRoute" "keda" "resources" }}
{{- $_ := set $own $key (mergeOverwrite (deepCopy (index $.root.Values $key | default dict)) (deepCopy (index $.pool $key | default dict))) }}
{{- end }}
{{- $_ := set $own "replicas" (ternary .pool.replicas .root.Values.replicas (hasKey .pool "replicas")) }}
{{- $_ := set $own "inferenceObjectives" (ternary .pool.inferenceObjectives .root.Values.inferenceObjectives (hasKey .pool "inferenceObjectives")) }}
{{- toYaml $own }}
{{- end }}

{{/* The settings that are given for a pool, as YAML. Of: root, pool. */}}
{{- define "flowcontrol.given" -}}
{{- toYaml (mergeOverwrite (deepCopy (.root.Values.config | default dict)) (deepCopy (.pool.config | default dict))) }}
{{- end }}

{{/* How a pool's replicas elect a leader; empty where they do not. Of: root, pool. */}}
{{- define "flowcontrol.election" -}}
{{- $election := dig "availability" "election" "off" (include "flowcontrol.given" . | fromYaml) | toString }}
{{- if not (has $election (list "off" "false")) }}{{ $election }}{{ end }}
{{- end }}

{{/*
Whether a pool's pods keep their state in a volume of their own: the configuration names no store,
and no leader is elected, who could not read another pod's. Of: root, pool.
*/}}
{{- define "flowcontrol.keepsState" -}}
{{- $state := (include "flowcontrol.given" . | fromYaml).state | default dict }}
{{- if and .root.Values.stateVolume.enabled (not (include "flowcontrol.election" .)) (not (hasKey $state "directory")) (not (hasKey $state "valkey")) }}yes{{ end }}
{{- end }}

{{/* The configuration file of a pool. Of: root, pool. */}}
{{- define "flowcontrol.config" -}}
{{- $ports := .root.Values.ports }}
{{- $given := include "flowcontrol.given" . | fromYaml }}
{{- $listen := dict "extProc" (printf "0.0.0.0:%v" $ports.extProc) "grpc" (printf "0.0.0.0:%v" $ports.grpc) "http" (printf "0.0.0.0:%v" $ports.http) }}
{{- $base := dict "apiVersion" "flowcontrol/v1alpha1" "kind" "FlowControlConfig" "pool" .pool.name "listen" $listen "picker" "least-loaded" "load" dict "admin" (dict "trustLoopback" false) }}
{{- if not (hasKey $given "objectives") }}
{{- $_ := set $base "objectives" (dict "kubernetes" (dict "writeStatus" .root.Values.writeStatus)) }}
{{- end }}
{{- if not (hasKey $given "endpoints") }}
{{- $_ := set $base "endpoints" (dict "kubernetes" dict) }}
{{- end }}
{{- if .root.Values.tls.existingSecret }}
{{- $tls := dict "certificate" "/etc/flowcontrol-tls/tls.crt" "key" "/etc/flowcontrol-tls/tls.key" }}
{{- if .root.Values.tls.clientCA }}{{ $_ := set $tls "clientCa" "/etc/flowcontrol-tls/ca.crt" }}{{ end }}
{{- $_ := set $base "tls" $tls }}
{{- end }}
{{- if or .root.Values.admin.existingSecret .root.Values.admin.token }}
{{- $_ := set $base.admin "tokenFile" "/etc/flowcontrol-admin/token" }}
{{- end }}
{{- if include "flowcontrol.keepsState" . }}
{{- $_ := set $base "state" (dict "directory" "/var/lib/flowcontrol-state") }}
{{- end }}
{{- include "flowcontrol.withoutNull" (mergeOverwrite $base $given) }}
{{- end }}

{{/* A mapping without what is null, which takes a default of the chart back. As YAML. */}}
{{- define "flowcontrol.withoutNull" -}}
{{- $kept := dict }}
{{- range $key, $value := . }}
{{- if kindIs "map" $value }}{{ $_ := set $kept $key (include "flowcontrol.withoutNull" $value | fromYaml) }}
{{- else if not (kindIs "invalid" $value) }}{{ $_ := set $kept $key $value }}{{ end }}
{{- end }}
{{- toYaml $kept }}
{{- end }}

{{/* Changes with the settings that a running service cannot change. Of: root, pool. */}}
{{- define "flowcontrol.fixed" -}}
{{- pick (include "flowcontrol.config" . | fromYaml) "pool" "listen" "tls" "admin" "traces" "ledger" "recentDecisions" "state" "availability" | toJson | sha256sum | trunc 12 }}
{{- end }}

{{/* Names of the Leases by which pools elect their leaders, as the service makes them; as YAML. */}}
{{- define "flowcontrol.leases" -}}
{{- $names := list }}
{{- range $pool := .Values.pools }}
{{- $of := dict "root" $ "pool" $pool }}
{{- if eq (include "flowcontrol.election" $of) "kubernetes" }}
{{- $guarded := (include "flowcontrol.config" $of | fromYaml).pool }}
{{- $name := printf "flowcontrol-%s" $guarded }}
{{- if or (gt (len $name) 63) (not (regexMatch "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$" $name)) }}
{{- $name = printf "%s-%s" (regexReplaceAll "-+$" (regexReplaceAll "[^a-z0-9-]+" (lower $name) "-" | trunc 54) "") ($guarded | sha256sum | trunc 8) }}
{{- end }}
{{- $names = append $names $name }}
{{- end }}
{{- end }}
{{- if $names }}{{ toYaml $names }}{{ end }}
{{- end }}
