{{/*
Whether the chart brings the snapshot-controller. A cluster has one of it and one set of its definitions, whatever drivers it has.
The definitions are in crds/: Helm makes those that are missing before anything else, and leaves those alone that are there. It neither
changes nor removes them later, so no upgrade and no uninstall takes a user's snapshots along. That the API is there therefore proves
nothing, at an upgrade least of all: whose it is says the label that only our definitions carry.
*/}}
{{- define "portolan.snapshotController" -}}
{{- $install := .Values.snapshotController.install -}}
{{- $crd := lookup "apiextensions.k8s.io/v1" "CustomResourceDefinition" "" "volumesnapshots.snapshot.storage.k8s.io" -}}
{{- $ours := eq (dig "metadata" "labels" "app.kubernetes.io/part-of" "" $crd) "portolan" -}}
{{- if or (eq $install "always") (and (eq $install "auto") (or (not $crd) $ours)) }}yes{{ end }}
{{- end }}

{{/* Whether there are group snapshots: a cluster's own definitions may be too old. Without a cluster to ask (helm template) there are. */}}
{{- define "portolan.groupSnapshots" -}}
{{- $crd := lookup "apiextensions.k8s.io/v1" "CustomResourceDefinition" "" "volumegroupsnapshots.groupsnapshot.storage.k8s.io" -}}
{{- $served := list -}}
{{- range dig "spec" "versions" list $crd }}{{ if .served }}{{ $served = append $served .name }}{{ end }}{{ end -}}
{{- if or (not $crd) (has "v1" $served) }}yes{{ end }}
{{- end }}
