# shellcheck shell=bash
# Building an image with what is there: buildah (needs no daemon), podman or docker. Debian's buildah is installed if there is none.

image_engine() {
  local engine
  for engine in ${CONTAINER_ENGINE:-buildah podman docker}; do
    case $engine in
      docker) docker info > /dev/null 2>&1 && { echo docker; return; } ;;
      *) command -v "$engine" > /dev/null && { echo "$engine"; return; } ;;
    esac
  done
  need buildah >&2
  echo buildah
}

buildah_in() {
  local store=$1
  shift
  buildah --root "$store/root" --runroot "$store/run" --storage-driver vfs "$@"
}

# image_archive NAME TAR CONTEXT: builds CONTEXT/Containerfile, for any kernel and without a network, into an archive with that name in it.
image_archive() {
  local name=$1 tar=$2 context=$3 new=$2.new.$$ store
  rm -f "$new"
  case $(image_engine) in
    docker)
      docker build -q -t "$name" -f "$context/Containerfile" "$context"
      docker save -o "$new" "$name"
      ;;
    podman)
      podman build -q -t "$name" -f "$context/Containerfile" "$context"
      podman save -q --format docker-archive -o "$new" "$name"
      ;;
    buildah)
      # A store of its own, thrown away: vfs works on every file system and in every container, but copies whole images.
      store=$(mktemp -d)
      buildah_in "$store" bud -q --isolation chroot --layers=false --timestamp 0 -t "$name" -f "$context/Containerfile" "$context"
      buildah_in "$store" push -q "$name" "docker-archive:$new:$name"
      rm -rf "$store"
      ;;
  esac
  mv "$new" "$tar"
}
