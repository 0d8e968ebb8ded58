# shellcheck shell=bash
# Building programs from Go modules. Sourced in the folder whose go.mod says which; all of it goes into a group's key.

command -v go > /dev/null || PATH=$PATH:/usr/local/go/bin
command -v go > /dev/null || die "go is not on the PATH; go.mod says which version is needed"
export GOFLAGS='-buildvcs=false -mod=readonly' CGO_ENABLED=0 GOTOOLCHAIN=local
export GOMODCACHE=$CACHE/gomod GOCACHE=$CACHE/gocache

# version MODULE: as pinned
version() { awk -v m="$1" '$1 == m || $2 == m { print $NF == "indirect" ? $(NF - 2) : $NF; exit }' "$LAB/go/go.mod"; }

# What programs say of themselves. Kubernetes' suites ask for the version, too.
go_flags() {
  local kubernetes variable
  kubernetes=$(version k8s.io/kubernetes)
  printf -- '-s -w'
  for variable in gitVersion="$kubernetes" gitMajor=1 gitMinor="$(cut -d. -f2 <<< "$kubernetes")" gitTreeState=clean \
    gitCommit="$kubernetes" buildDate=1970-01-01T00:00:00Z; do
    printf -- ' -X k8s.io/component-base/version.%s' "$variable"
  done
  printf -- ' -X github.com/containerd/containerd/v2/version.Version=%s' "$(version github.com/containerd/containerd/v2)"
}

# compile FOLDER GO COMMAND...: the programs appear in the folder when they are whole.
compile() {
  local folder=$1 new
  shift
  new=$(mktemp -d -p "$folder")
  nice "$@" -v -trimpath -ldflags "$(go_flags)" -o "$new/" "${packages[@]}"
  mv "$new"/* "$folder/"
  rmdir "$new"
}

# program FOLDER NAME PACKAGE... NAME is what go build calls the last one's executable; nothing is done if it is there.
program() {
  local packages=("${@:3}")
  [ -e "$1/$2" ] || step "go build $2" compile "$1" go build
}

# test_program FOLDER NAME: cmd/NAME, which is a test, as the program NAME.test
test_program() {
  local packages=("./cmd/$2")
  [ -e "$1/$2.test" ] || step "go test -c $2" compile "$1" go test -c
}
