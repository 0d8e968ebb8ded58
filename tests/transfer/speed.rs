//! How fast a transfer is beside a bare `zfs send` into a TCP connection to `zfs recv`: by hand (docs/benchmarks.md), and nothing is asserted about times.

use std::io::{Seek, SeekFrom, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use portolan_csi::transfer::{Limits, fetch};
use portolan_tests::contract::{Node, create};
use portolan_zfs::{DatasetName, Property, Snapshot, Zfs};

use super::setup::{Authority, Server, fetching};
use crate::zfs::Real;

const PAIRS: usize = 7;

/// `zfs` on a node, with a TCP connection for its standard input or output.
fn start(node: &Real, words: &[&str], stdin: impl Into<Stdio>, stdout: impl Into<Stdio>) -> Child {
    let pid = node.node.pid().to_string();
    let mut command = Command::new("nsenter");
    command.args(["-t", &pid, "-m", "--", "zfs"]).args(words).stdin(stdin).stdout(stdout);
    command.spawn().unwrap()
}

fn bare(a: &Real, b: &Real, snapshot: &Snapshot, base: Option<&Snapshot>, target: &DatasetName) -> Duration {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let begin = Instant::now();
    let out = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (into, _) = listener.accept().unwrap();
    let name = snapshot.name.to_string();
    let base = base.map(|base| base.name.to_string());
    let words = [&["send"][..], &base.as_ref().map_or(vec![], |base| vec!["-i", base]), &[&name]].concat();
    let mut receive = start(b, &["recv", "-u", target.as_str()], OwnedFd::from(into), Stdio::null());
    let mut send = start(a, &words, Stdio::null(), OwnedFd::from(out));
    assert!(send.wait().unwrap().success());
    assert!(receive.wait().unwrap().success());
    begin.elapsed()
}

async fn change(node: &Real, volume: &DatasetName, name: &str, from: u64, bytes: usize) -> Snapshot {
    let mut random = vec![0; bytes];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom").unwrap(), &mut random).unwrap();
    node.zfs().mount(volume).await.unwrap();
    let path = node.node.files(volume.short()).join("content");
    let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(false).open(path).unwrap();
    file.seek(SeekFrom::Start(from)).unwrap();
    file.write_all(&random).unwrap();
    file.sync_all().unwrap();
    drop(file);
    node.zfs().unmount(volume).await.unwrap();
    node.zfs().snapshot(&volume.snapshot(name).unwrap()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "measures: by hand, in release"]
async fn speed() {
    let (a, b, ca) = (Real::of(2048), Real::of(6144), Authority::new());
    let volume = create(&a, "pvc-1").await;
    a.zfs().set_property(&volume, &Property::refquota(1 << 30)).await.unwrap();
    let one = change(&a, &volume, "one", 0, 256 << 20).await;
    let two = change(&a, &volume, "two", 8 << 20, 1 << 20).await;
    let server = Server::start(&ca.identity("node-a"), &a, "node-b").await;
    let identity = ca.identity("node-b");
    for (what, snapshot, base) in [("all of 256 MiB", &one, None), ("a delta of 1 MiB", &two, Some(&one))] {
        let mut ratios = Vec::new();
        for i in 0..PAIRS {
            let target = |who: &str| b.pool().child(&format!("{who}-{i}")).unwrap();
            let ours = async || {
                let mut what = fetching(server.address, "node-a", snapshot, &b);
                what.target = target("ours");
                let begin = Instant::now();
                let received = fetch(&identity, b.zfs(), Limits::default(), what, |_| {}).await.unwrap();
                (begin.elapsed(), received.bytes)
            };
            let bare = || bare(&a, &b, snapshot, base, &target("bare"));
            let ((ours, bytes), bare) = if i % 2 == 0 {
                let ours = ours().await;
                (ours, bare())
            } else {
                let bare = bare();
                (ours().await, bare)
            };
            ratios.push(ours.as_secs_f64() / bare.as_secs_f64());
            println!("{what}: {bytes} bytes in {ours:?}, bare {bare:?}, ratio {:.2}", ratios[i]);
        }
        ratios.sort_by(f64::total_cmp);
        println!("{what}: ratio min {:.2} median {:.2} max {:.2}", ratios[0], ratios[PAIRS / 2], ratios[PAIRS - 1]);
    }
}
