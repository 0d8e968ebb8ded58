# shellcheck shell=bash
# Sourced by every script of the lab: places, names, and how to say what goes on.

LAB=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export LANE=${LANE:-native}
CACHE=${PORTOLAN_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/portolan}
CLUSTER=${LAB_NAME:-$LANE}  # several can run side by side, under names of their own
STATE=$CACHE/state/$CLUSTER # of the running cluster
KIT=$CACHE/lab              # what was built
NET=10.89.0                 # nodes: .1 is the control plane, .10+k node k
POD=10.244                  # pods of node k: .k.0/24
SVC=10.96                   # services
POOL=portolan

say() { printf '[%5.1fs] %s\n' "$(elapsed)" "$*" >&2; }
die() { echo "lab: $*" >&2; exit 1; }

# elapsed: seconds since the script began, with a fraction; STARTED is kept across scripts that call each other.
export STARTED=${STARTED:-$EPOCHREALTIME}
elapsed() { awk -v a="$STARTED" -v b="$EPOCHREALTIME" 'BEGIN { print b - a }'; }

# step WHAT COMMAND...: runs it with its output in a log; says what it waits for every 15 s, and how long it took.
step() {
  local what=$1 log pid began=$SECONDS told=$SECONDS
  shift
  mkdir -p "$CACHE/log"
  log=$CACHE/log/$(tr -cs 'A-Za-z0-9.\n' - <<< "$what").$$.log   # two may be at the same thing
  say "$what ..."
  set -m   # a process group of its own, so that all of it can be ended
  (set -e; "$@") > "$log" 2>&1 < /dev/null &
  pid=$!
  set +m
  trap 'kill -- "-$pid" 2> /dev/null; exit 130' INT TERM
  while kill -0 "$pid" 2> /dev/null; do
    sleep 0.1
    if ((SECONDS - told >= 15)); then
      told=$SECONDS
      say "  still at it ($((SECONDS - began)) s): $(tail -n1 "$log" | cut -c1-110)"
    fi
  done
  wait "$pid" || { tail -n 30 "$log" >&2; die "$what failed; the whole log is $log"; }
  trap - INT TERM
  rm -f "$log"
  say "$what: done in $((SECONDS - began)) s"
}

# key FILES AND WORDS...: the name of what is built from them, short. A file counts by its content, a folder by its files', a word by itself.
key() {
  local thing file
  for thing; do
    if [ -e "$thing" ]; then
      find "$thing" -type f | LC_ALL=C sort | while read -r file; do sha256sum < "$file"; done
    else
      echo "$thing"
    fi
  done | sha256sum | cut -c1-16
}

# eventually SECONDS COMMAND...: tries until it succeeds or time is up.
eventually() {
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS < end)) || return 1
    sleep 0.1
  done
}

node_ip() { echo "$NET.$((10 + $1))"; }
pod_cidr() { echo "$POD.$1.0/24"; }

# prune KEEP FILES...: removes all of the files but KEEP.
prune() {
  local keep=$1 file
  shift
  for file; do [ "$file" = "$keep" ] || rm -rf --one-file-system "$file"; done
}
