{{/*
The CSI sidecars beside the controller. Each chooses a leader of its own: every replica's controller answers at its socket.
Provisioning and attachment have none: the controller does these by itself.
*/}}
{{- define "portolan.sidecars" -}}
{{- with .Values.sidecars.snapshotter }}
{{- if .enabled }}
- name: snapshotter
  image: "{{ .image.repository }}:{{ .image.tag }}"
  imagePullPolicy: {{ $.Values.image.pullPolicy }}
  args:
    {{- include "portolan.sidecarArguments" $ | nindent 4 }}
    # The snapshot's name and namespace come with each call.
    - --extra-create-metadata
    {{- if include "portolan.groupSnapshots" $ }}
    - --feature-gates=CSIVolumeGroupSnapshot=true
    {{- end }}
  {{- include "portolan.sidecarRest" $ | nindent 2 }}
{{- end }}
{{- end }}
{{- with .Values.sidecars.resizer }}
{{- if .enabled }}
- name: resizer
  image: "{{ .image.repository }}:{{ .image.tag }}"
  imagePullPolicy: {{ $.Values.image.pullPolicy }}
  args:
    {{- include "portolan.sidecarArguments" $ | nindent 4 }}
    # Volumes grow while they are in use, so the resizer need not watch every pod of the cluster to wait for its end.
    - --handle-volume-inuse-error=false
  {{- include "portolan.sidecarRest" $ | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{- define "portolan.sidecarArguments" -}}
- --csi-address=/csi/csi.sock
- --leader-election
- --timeout=60s
{{ include "portolan.patience" . }}
{{- end }}

{{/* The defaults, five minutes and 5 requests a second, are made for slow and rare operations. */}}
{{- define "portolan.patience" -}}
- --retry-interval-max=30s
- --kube-api-qps=50
- --kube-api-burst=100
{{- end }}

{{- define "portolan.sidecarRest" -}}
env:
  - name: POD_NAMESPACE
    valueFrom: { fieldRef: { fieldPath: metadata.namespace } }
{{ include "portolan.unprivileged" . }}
resources: {{- toYaml .Values.resources.sidecars | nindent 2 }}
volumeMounts:
  - { name: csi, mountPath: /csi }
{{- end }}
