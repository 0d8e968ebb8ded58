//! Unix sockets on the host.

use std::io;
use std::path::Path;

use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;

use super::mounts::Mounts;

/// Listens at a path of the host, in place of whatever socket an earlier process has left there.
pub(super) fn listen(mounts: &Mounts, path: &Path) -> io::Result<UnixListenerStream> {
    let here = mounts.here(path);
    if let Some(parent) = here.parent() {
        std::fs::create_dir_all(parent)?;
    }
    match std::fs::remove_file(&here) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    UnixListener::bind(&here).map(UnixListenerStream::new)
}
