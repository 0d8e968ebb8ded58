//! Volumes sent from node to node: by a move, and beside it by `zfs send` into a bare TCP connection to `zfs recv`, both ways.

use anyhow::{Context, Result};
use portolan_bench::stats::{Pairs, Table};
use portolan_e2e::lab::{Lab, text};

use crate::{
    Sizes,
    bare::{Bare, FOLDER, dataset, options},
    syncoid::Syncoid,
    volumes::{NAMESPACE, Watches, between, claim},
    watch::Event,
};

const BARE: &str = "`zfs send`, TCP, `zfs recv`";
/// Seconds after which something has gone wrong.
pub const PATIENCE: u64 = 300;
/// The bare receiver's, on the nodes' own addresses.
const PORT: u16 = 7799;
/// Listens, and goes on in the background: one connection is the standard input of `zfs recv`, and is told how that ended.
const RECEIVER: &str = r#"use Socket; my ($port, $dataset) = @ARGV; socket(my $s, PF_INET, SOCK_STREAM, 0) or die; setsockopt($s, SOL_SOCKET, SO_REUSEADDR, 1); bind($s, sockaddr_in($port, INADDR_ANY)) or die "bind: $!"; listen($s, 1) or die; exit 0 if fork; accept(my $c, $s) or die; @IN@; syswrite($c, $ended == 0 ? "good" : "bad");"#;
const INTO_RECV: &str = r#"open(STDIN, "<&", $c) or die; my $ended = system("zfs", "recv", "-u", $dataset)"#;
/// Connects: the connection is the standard output of `zfs send`. Ends when the receiver has, and as well.
const SENDER: &str = r#"use Socket; my ($host, $port, @send) = @ARGV; socket(my $c, PF_INET, SOCK_STREAM, 0) or die; connect($c, sockaddr_in($port, inet_aton($host))) or die "connect: $!"; @OUT@; shutdown($c, 1); sysread($c, my $answer, 4); die "zfs recv failed" if $answer ne "good";"#;
const OUT_OF_SEND: &str = r#"my $child = fork; if ($child == 0) { open(STDOUT, ">&", $c) or die; exec("zfs", "send", @send) or die } waitpid($child, 0); die "zfs send: $?" if $?"#;
/// The same with a relay at each end, that copies between the connection and a pipe of 1 MiB (F_SETPIPE_SZ is 1031) and looks at nothing: what
/// no program between the two can do without.
const COPIED_INTO_RECV: &str = r#"open(my $p, "|-", "zfs", "recv", "-u", $dataset) or die; fcntl($p, 1031, 1 << 20) or die; while (sysread($c, my $b, 1 << 18)) { my $o = 0; $o += syswrite($p, $b, length($b) - $o, $o) // die while $o < length($b) } close($p); my $ended = $?"#;
const COPIED_OUT_OF_SEND: &str = r#"open(my $p, "-|", "zfs", "send", @send) or die; fcntl($p, 1031, 1 << 20) or die; while (sysread($p, my $b, 1 << 18)) { my $o = 0; $o += syswrite($c, $b, length($b) - $o, $o) // die while $o < length($b) } close($p) or die "zfs send: $?""#;

/// One end of the bare connection.
pub struct End<'a> {
    /// Its node.
    pub node: String,
    /// Where other nodes reach it.
    pub address: String,
    /// Its shell.
    pub bare: &'a mut Bare,
}

impl<'a> End<'a> {
    /// The end on a node.
    ///
    /// # Errors
    /// When the node has no address for transfers.
    pub fn new(lab: &Lab, node: &str, bare: &'a mut Bare) -> Result<Self> {
        Ok(Self { node: node.to_owned(), address: address(lab, node)?, bare })
    }

    /// Destroys a bare dataset with its snapshots.
    ///
    /// # Errors
    /// When it is still there after that.
    pub fn destroy(&mut self, copy: &str) -> Result<()> {
        // zfs-fuse calls a dataset busy for a moment after it was unmounted.
        self.bare.time(&format!(
            "for i in $(seq 50); do zfs destroy -r {copy} && break; sleep 0.1; done; ! zfs list {copy}"
        ))?;
        Ok(())
    }
}

/// What is sent: `zfs send`'s arguments, and the dataset that it is received into.
pub struct Sent {
    pub arguments: String,
    pub dataset: String,
}

/// The rows of one kind of transfer.
struct Rows {
    transfer: Pairs,
    whole: Pairs,
}

impl Rows {
    fn new(what: &str, bare: &'static str) -> Self {
        let transfer = Pairs::new(format!("{what}: final snapshot published → received, the target owns it"), bare);
        Self { transfer, whole: Pairs::new(format!("{what}: move asked for → writable on the target"), bare) }
    }

    fn push(&mut self, (transfer, whole): (f64, f64), bare: f64) {
        self.transfer.push(transfer, bare);
        self.whole.push(whole, bare);
    }
}

/// A volume of incompressible bytes goes to another node, and comes back as a delta of 1 MiB; so often as there are pairs, each beside the
/// same of bare ZFS.
///
/// # Errors
/// When something does not move.
pub fn measure(lab: &Lab, watches: &Watches, a: &mut End<'_>, b: &mut End<'_>, sizes: &Sizes) -> Result<Table> {
    let (node, other) = (a.node.clone(), b.node.clone());
    let mebibytes = sizes.transfer >> 20;
    make_random(a, sizes.transfer)?;
    let mut full = Rows::new(&format!("all of {mebibytes} MiB"), BARE);
    let mut beside_syncoid = Pairs::new(full.transfer.what(), "`syncoid` by SSH");
    let mut relayed = Pairs::new("the same by two relays that look at nothing, without Portolan", BARE);
    let syncoid = Syncoid::start(lab, a, b)?;
    let mut delta = Rows::new(&format!("a delta of 1 MiB of {mebibytes}"), "`zfs send -i`, TCP, `zfs recv`");
    for i in 0..sizes.pairs {
        let name = format!("transfer-{i}");
        let (volume, all) = filled(lab, watches, a, &name, sizes.transfer)?;
        let copy = all.dataset.clone();
        let (ours, bare) = pair(i, || moved(lab, watches, &name, &volume, &other), || send(a, b, &all))?;
        full.push(ours, bare);
        let by_relay = Sent { arguments: all.arguments.clone(), dataset: dataset(&format!("relayed-{i}")) };
        relayed.push(send_by(a, b, &by_relay, (COPIED_OUT_OF_SEND, COPIED_INTO_RECV))?, bare);
        b.destroy(&by_relay.dataset)?;
        if let Some(syncoid) = &syncoid {
            let target = dataset(&format!("syncoid-{i}"));
            beside_syncoid.push(ours.0, syncoid.send(a, b, &copy, &target)?);
            b.destroy(&target)?;
        }

        b.bare.time(&change(&format!("portolan/{volume}"), SOME_BYTES))?;
        b.bare.time(&format!("zfs set canmount=noauto {copy} && zfs set atime=off {copy}"))?;
        b.bare.time(&format!("zfs set mountpoint={FOLDER}/{name} {copy}"))?;
        b.bare.time(&change(&copy, SOME_BYTES))?;
        b.bare.time(&format!("zfs snapshot {copy}@two"))?;
        let some = Sent { arguments: format!("-i @one {copy}@two"), dataset: copy.clone() };
        let (ours, bare) = pair(i, || moved(lab, watches, &name, &volume, &node), || send(b, a, &some))?;
        delta.push(ours, bare);

        take_away(lab, a, b, &name, &copy)?;
    }
    let mut rows = vec![full.transfer, relayed, full.whole, delta.transfer, delta.whole];
    if let Some(syncoid) = syncoid {
        syncoid.stop(b)?;
        rows.insert(1, beside_syncoid);
    }
    Ok(Table::new("A volume from node to node", "ms", rows))
}

/// All of a volume, and nothing else of it, from one node to the other; so often as there are pairs.
///
/// # Errors
/// When something does not move.
pub fn whole(lab: &Lab, watches: &Watches, a: &mut End<'_>, b: &mut End<'_>, sizes: &Sizes) -> Result<Vec<Pairs>> {
    make_random(a, sizes.transfer)?;
    let mut rows = Rows::new(&format!("all of {} MiB", sizes.transfer >> 20), BARE);
    for i in 0..sizes.pairs {
        let name = format!("whole-{i}");
        let (volume, all) = filled(lab, watches, a, &name, sizes.transfer)?;
        let to = b.node.clone();
        let (ours, bare) = pair(i, || moved(lab, watches, &name, &volume, &to), || send(a, b, &all))?;
        rows.push(ours, bare);
        take_away(lab, a, b, &name, &all.dataset)?;
    }
    Ok(vec![rows.transfer, rows.whole])
}

/// Bytes that no compression makes fewer, for [`filled`].
fn make_random(at: &mut End<'_>, bytes: u64) -> Result<()> {
    at.bare.time(&format!("mkdir -p {FOLDER} && head -c {bytes} /dev/urandom > {FOLDER}/random")).map(drop)
}

/// A claim with these bytes in its volume, and a bare dataset with the same, ready to be sent.
fn filled(lab: &Lab, watches: &Watches, at: &mut End<'_>, name: &str, bytes: u64) -> Result<(String, Sent)> {
    let copy = dataset(name);
    let volume = new_volume(lab, watches, name, &at.node, bytes)?;
    at.bare.time(&change(&format!("portolan/{volume}"), &whole_file()))?;
    at.bare.time(&format!("zfs create {} {copy}", options(name, 2 * bytes)))?;
    at.bare.time(&change(&copy, &whole_file()))?;
    at.bare.time(&format!("zfs snapshot {copy}@one"))?;
    Ok((volume, Sent { arguments: format!("{copy}@one"), dataset: copy }))
}

fn take_away(lab: &Lab, a: &mut End<'_>, b: &mut End<'_>, name: &str, copy: &str) -> Result<()> {
    lab.kubectl(&["-n", NAMESPACE, "delete", "pvc", name, "--timeout=2m"])?;
    a.destroy(copy)?;
    b.destroy(copy)
}

/// A pair of samples; who is first changes from pair to pair.
fn pair<O, B>(i: usize, ours: impl FnOnce() -> Result<O>, bare: impl FnOnce() -> Result<B>) -> Result<(O, B)> {
    if i.is_multiple_of(2) {
        let ours = ours()?;
        return Ok((ours, bare()?));
    }
    let bare = bare()?;
    Ok((ours()?, bare))
}

/// Where other nodes reach a node.
fn address(lab: &Lab, node: &str) -> Result<String> {
    let object = lab.json(&["get", "storagenode", node])?;
    host_of(text(&object, "/status/transferAddress")?)
}

/// The host of `host:port`.
fn host_of(address: &str) -> Result<String> {
    let (host, _) = address.rsplit_once(':').with_context(|| format!("{address} has no port"))?;
    Ok(host.to_owned())
}

/// Makes a claim on a node, with room for twice so many bytes; returns its volume when that is Ready.
///
/// # Errors
/// When it isn't.
pub fn new_volume(lab: &Lab, watches: &Watches, name: &str, node: &str, bytes: u64) -> Result<String> {
    lab.apply(&claim(name, 2 * bytes, Some(node), None))?;
    let (_, volume) = watches.claim(name)?;
    let is = |event: &Event| event.of(&volume) && event.in_phase("Ready");
    watches.volumes.first(&format!("{volume} is Ready"), PATIENCE, is)?;
    Ok(volume)
}

/// Moves the claim, which no pod uses: milliseconds of the transfer, and of all.
///
/// # Errors
/// When it does not move.
pub fn moved(lab: &Lab, watches: &Watches, name: &str, volume: &str, to: &str) -> Result<(f64, f64)> {
    lab.apply(&migration(name, to))?;
    let first = |what: &str, is: &dyn Fn(&Event) -> bool| {
        watches.volumes.first(&format!("{volume}: {what}"), PATIENCE, |event| event.of(volume) && is(event))
    };
    let asked = first("the move is asked for", &|event| is_moving(event, to, "Quiescing"))?;
    let published = first("the final snapshot is published", &|event| is_moving(event, to, "FinalSync"))?;
    let received = first("it is received", &|event| is_moving(event, to, "Activating"))?;
    let writable = first("it is writable", &|event| is_at(event, to))?;
    let done = ["-n", NAMESPACE, "wait", "--for=jsonpath={.status.phase}=Done", "--timeout=2m"];
    let object = format!("volumemigration/{name}");
    lab.kubectl(&[&done[..], &[&object]].concat())?;
    lab.kubectl(&["-n", NAMESPACE, "delete", &object, "--timeout=1m"])?;
    Ok((between(published, received), between(asked, writable)))
}

/// The cold move of a claim; both have the same name.
pub fn migration(name: &str, to: &str) -> String {
    format!(
        "{{apiVersion: portolan.dev/v1alpha1, kind: VolumeMigration, metadata: {{name: {name}, namespace: {NAMESPACE}}}, \
         spec: {{claim: {name}, node: {to}, mode: Cold}}}}"
    )
}

/// Whether a volume's handoff to a node is in a phase.
pub fn is_moving(event: &Event, to: &str, phase: &str) -> bool {
    let handoff = &event.object["status"]["handoff"];
    handoff["to"] == to && handoff["phase"] == phase
}

/// Whether a volume has come to a node by a handoff, which is over.
pub fn is_at(event: &Event, to: &str) -> bool {
    let status = &event.object["status"];
    status["handoff"].is_null() && status["owner"] == to && status["lastHandoff"]["to"] == to
}

/// Sends from one end to the other: the sender's milliseconds, until all is received.
///
/// # Errors
/// When either end fails.
pub fn send(from: &mut End<'_>, to: &mut End<'_>, what: &Sent) -> Result<f64> {
    send_by(from, to, what, (OUT_OF_SEND, INTO_RECV))
}

fn send_by(from: &mut End<'_>, to: &mut End<'_>, what: &Sent, (out, into): (&str, &str)) -> Result<f64> {
    let (receiver, sender) = (RECEIVER.replace("@IN@", into), SENDER.replace("@OUT@", out));
    to.bare.time(&format!("perl -e '{receiver}' {PORT} {} > /dev/null 2>&1", what.dataset))?;
    from.bare.time(&format!("perl -e '{sender}' {} {PORT} {}", to.address, what.arguments))
}

const SOME_BYTES: &str = "dd if=/dev/urandom of=$at/data bs=1M count=1 conv=notrunc";

fn whole_file() -> String {
    format!("cp {FOLDER}/random $at/data")
}

/// The command that mounts a dataset, does something in it (`$at`), and unmounts it.
pub fn change(dataset: &str, what: &str) -> String {
    format!(
        "at=$(zfs get -H -o value mountpoint {dataset}) && mkdir -p $at && zfs mount {dataset} && {what} && zfs umount {dataset} && rmdir $at"
    )
}

#[cfg(test)]
mod tests {
    use std::{process::Command, time::Instant};

    use super::*;

    fn event(status: serde_json::Value) -> Event {
        Event { at: Instant::now(), kind: "MODIFIED".into(), object: serde_json::json!({ "status": status }) }
    }

    #[test]
    fn the_ends_of_a_move_are_told_from_those_of_the_move_before() {
        let there = event(serde_json::json!({ "owner": "a", "handoff": { "to": "b", "phase": "FinalSync" } }));
        assert!(is_moving(&there, "b", "FinalSync"));
        assert!(!is_moving(&there, "a", "FinalSync") && !is_moving(&there, "b", "Activating") && !is_at(&there, "a"));
        let back = event(serde_json::json!({ "owner": "a", "lastHandoff": { "to": "a" } }));
        assert!(is_at(&back, "a") && !is_at(&back, "b"));
        assert!(!is_at(&event(serde_json::json!({ "owner": "a" })), "a"), "it was made there");
    }

    #[test]
    fn addresses_lose_their_port() {
        assert_eq!(host_of("10.0.0.1:7791").unwrap(), "10.0.0.1");
        assert!(host_of("nowhere").is_err());
    }

    #[test]
    fn who_is_first_changes_from_pair_to_pair() {
        let order = std::cell::RefCell::new(Vec::new());
        let run = |who| {
            order.borrow_mut().push(who);
            Ok(who)
        };
        for i in 0..2 {
            assert_eq!(pair(i, || run("ours"), || run("bare")).unwrap(), ("ours", "bare"));
        }
        assert_eq!(*order.borrow(), ["ours", "bare", "bare", "ours"]);
    }

    /// The two programs between two `zfs` that only copy: what arrives, and that the sender waits for it and knows how it ended.
    #[test]
    fn the_bare_connection_brings_all_and_says_how_it_ended() {
        let folder = std::env::temp_dir().join(format!("portolan-bench-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let zfs = "#!/bin/sh\n[ $1 = send ] && exec head -c 3000000 /dev/zero\nsleep 0.3; wc -c > \"$3\"; [ \"$3\" != wrong ]\n";
        std::fs::write(folder.join("zfs"), zfs).unwrap();
        let run = |text: &str| {
            let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap());
            let text = format!("chmod +x zfs; {text}");
            Command::new("bash").args(["-c", &text]).env("PATH", path).current_dir(&folder).output().unwrap()
        };
        let ways = [(OUT_OF_SEND, INTO_RECV), (COPIED_OUT_OF_SEND, COPIED_INTO_RECV)];
        for (dataset, good, (out, into)) in ways.iter().flat_map(|way| [("right", true, way), ("wrong", false, way)]) {
            // One that is free: the same test may run beside.
            let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let receiver = RECEIVER.replace("@IN@", into);
            let receiver = run(&format!("perl -e '{receiver}' {port} {dataset} > /dev/null 2>&1"));
            assert!(receiver.status.success(), "{receiver:?}");
            let sender = SENDER.replace("@OUT@", out);
            let sender = run(&format!("perl -e '{sender}' 127.0.0.1 {port} tank@one"));
            assert_eq!(sender.status.success(), good, "{sender:?}");
            assert_eq!(std::fs::read_to_string(folder.join(dataset)).unwrap().trim(), "3000000");
        }
        std::fs::remove_dir_all(folder).unwrap();
    }
}
