# shellcheck shell=bash
# A box: a process that is pid 1 of mount, network, pid, UTS, IPC and cgroup namespaces of its own. The control plane is one, and
# so is each native node. Ending its pid 1 ends every process in it and takes its mounts and interfaces along, as a power cut would.
#
# $STATE/NAME/{pid,pidns,cgroups,logs/}

box_pid() { cat "$STATE/$1/pid" 2> /dev/null; }

# The pid may have been given to another process meanwhile: its pid namespace tells.
box_alive() {
  local pid
  pid=$(box_pid "$1") && [ -n "$pid" ] &&
    [ "$(stat -Lc %i "/proc/$pid/ns/pid" 2> /dev/null)" = "$(cat "$STATE/$1/pidns" 2> /dev/null)" ]
}

in_net() { local box=$1; shift; nsenter -t "$(box_pid "$box")" -n -- "$@"; }
in_box() { local box=$1; shift; nsenter -t "$(box_pid "$box")" -m -n -p -u -i -C -- "$@"; }

# box_cgroups NAME: the folders of the box's cgroup, one for each hierarchy, below the cgroup that this shell is in.
box_cgroups() {
  local controller own
  if [ "$(stat -fc %T /sys/fs/cgroup)" = cgroup2fs ]; then
    echo "/sys/fs/cgroup/portolan-$CLUSTER/$1"
    return
  fi
  for controller in cpu cpuacct cpuset memory devices freezer blkio pids systemd; do
    [ -d "/sys/fs/cgroup/$controller" ] || continue
    own=$(awk -F: -v c="$controller" '{ n = split($2, names, ",")
      for (i = 1; i <= n; i++) if (names[i] == c || names[i] == "name=" c) print $3 }' /proc/self/cgroup)
    echo "/sys/fs/cgroup/$controller${own%/}/portolan-$CLUSTER/$1"
  done
}

make_cgroup() {
  local dir=$1 parent=${1%/*} file
  mkdir -p "$dir"
  if [ -e "$parent/cgroup.subtree_control" ]; then
    for file in "${parent%/*}" "$parent"; do
      sed 's/[^ ]*/+&/g' "$file/cgroup.controllers" > "$file/cgroup.subtree_control"
    done
  elif [ -e "$dir/cpuset.cpus" ]; then
    for file in cpuset.cpus cpuset.mems; do   # a new cpuset is empty, and then takes no process
      [ -n "$(cat "$parent/$file")" ] || cat "${parent%/*}/$file" > "$parent/$file"
      cat "$parent/$file" > "$dir/$file"
    done
    echo 1 > "$dir/cgroup.clone_children"
  fi
}

# box_start NAME COMMAND...
box_start() {
  local box=$1 dir own unshare pid=
  shift
  mkdir -p "$STATE/$box/logs"
  box_cgroups "$box" > "$STATE/$box/cgroups"
  while read -r dir; do make_cgroup "$dir"; done < "$STATE/$box/cgroups"
  # shellcheck disable=SC2016
  setsid bash -c 'while read -r dir; do echo $$ > "$dir/cgroup.procs"; done < "$0"
    exec unshare --cgroup --mount --net --pid --uts --ipc --fork --kill-child=KILL --propagation private "$@"' \
    "$STATE/$box/cgroups" "$@" > "$STATE/$box/logs/init.log" 2>&1 < /dev/null &
  unshare=$!
  own=$(stat -Lc %i /proc/self/ns/pid)
  find_child() {   # the child that has a pid namespace of its own is the box's pid 1
    kill -0 "$unshare" 2> /dev/null || return 1
    pid=$(tr -d ' ' < "/proc/$unshare/task/$unshare/children" 2> /dev/null) && [ -n "$pid" ] &&
      pidns=$(stat -Lc %i "/proc/$pid/ns/pid" 2> /dev/null) && [ "$pidns" != "$own" ]
  }
  local pidns
  eventually 10 find_child || { cat "$STATE/$box/logs/init.log" >&2; die "$box did not start"; }
  # On a machine with cgroup v2 only: a cgroup with a process in it may not give controllers to its children. pid 1 moves itself.
  [ ! -e /sys/fs/cgroup/cgroup.procs ] || echo "$unshare" > /sys/fs/cgroup/cgroup.procs
  echo "$pid" > "$STATE/$box/pid"
  echo "$pidns" > "$STATE/$box/pidns"
}

# box_kill NAME: no warning, no clean-up inside. What is left of its cgroups goes too.
box_kill() {
  local box=$1 pid dir try
  if box_alive "$box"; then
    pid=$(box_pid "$box")
    kill -KILL "$pid"
    eventually 10 test ! -d "/proc/$pid" || die "$box: process $pid does not end"
  fi
  [ -e "$STATE/$box/cgroups" ] || return 0
  while read -r dir; do
    [ -d "$dir" ] || continue
    find "$dir" -name cgroup.procs -exec cat {} + | while read -r pid; do kill -KILL "$pid" 2> /dev/null || true; done
    for try in 1 2 3 4 5 6 7 8 9 10; do
      find "$dir" -depth -type d -exec rmdir {} + 2> /dev/null || true
      [ -d "$dir" ] || break
      sleep "0.0$try"
    done
    rmdir "${dir%/*}" 2> /dev/null || true
  done < "$STATE/$box/cgroups"
  rm -f "$STATE/$box"/{pid,pidns,cgroups}
}
