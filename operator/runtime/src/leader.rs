//! At most one process of a Deployment works: the one that holds a Lease.

use std::future::Future;
use std::time::{Duration, Instant};

use kube_lease_manager::{LeaseManager, LeaseManagerBuilder, LeaseManagerError};
use tokio_util::sync::CancellationToken;

use crate::client::within;

/// Seconds for which a Lease is valid without being renewed.
const LEASE_SECONDS: u64 = 15;
/// Seconds before its end when the holder renews it: so long may renewing fail before leadership counts as lost.
const GRACE_SECONDS: u64 = 8;
/// Less than the grace, so that this process has stopped when another takes over.
const GIVE_UP_AFTER: Duration = Duration::from_secs(7);
/// Grace less the above.
const STOP_WITHIN: Duration = Duration::from_secs(1);
/// How long a request about the Lease may take. With the pause after each, three of them that aren't answered take just as long as it takes to give up.
const PATIENCE: Duration = Duration::from_secs(2);
const RETRY_EVERY: Duration = Duration::from_millis(500);

/// Why leading ended, other than by `shutdown`.
#[derive(Debug, thiserror::Error)]
pub enum LeaderError {
    /// The Lease can't be read or made.
    #[error("can't use Lease {namespace}/{lease}")]
    Lease {
        /// Namespace of the Lease.
        namespace: String,
        /// Its name.
        lease: String,
        /// Why.
        source: LeaseManagerError,
    },
    /// Another process leads now, or the Lease could not be renewed in time.
    #[error("leadership by Lease {namespace}/{lease} is lost")]
    Lost {
        /// Namespace of the Lease.
        namespace: String,
        /// Its name.
        lease: String,
    },
    /// The work ended though nobody asked it to.
    #[error("the work of the leader ended by itself")]
    WorkEnded,
}

/// Waits for leadership and runs `work` while it lasts; its token is cancelled when leadership is lost or `shutdown` is cancelled.
///
/// Returns `Ok` after `shutdown` (the Lease is released then, so that another takes over at once).
///
/// # Errors
/// When the Lease can't be used, when leadership is lost, or when `work` ends by itself: the process should end then, and be
/// started again.
pub async fn run<F, Fut>(
    client: kube::Client,
    namespace: &str,
    lease: &str,
    identity: &str,
    shutdown: CancellationToken,
    work: F,
) -> Result<(), LeaderError>
where
    F: FnOnce(CancellationToken) -> Fut,
    Fut: Future<Output = ()>,
{
    let failed = |source| LeaderError::Lease { namespace: namespace.to_owned(), lease: lease.to_owned(), source };
    // The manager renews without telling: only its failures show how long ago that was.
    let client = within(client, PATIENCE, CancellationToken::new());
    let manager = LeaseManagerBuilder::new(client, lease)
        .with_namespace(namespace)
        .with_identity(identity)
        // The default has a random identity in it; that one's name stays the same over restarts.
        .with_field_manager(format!("portolan-{identity}"))
        .with_duration(LEASE_SECONDS)
        .with_grace(GRACE_SECONDS)
        .build()
        .await
        .map_err(failed)?;

    tokio::select! {
        () = shutdown.cancelled() => return Ok(()),
        () = until_changed_to(&manager, true, None) => {}
    }
    tracing::info!(lease, identity, "leading");

    let token = shutdown.child_token();
    let mut work = std::pin::pin!(work(token.clone()));
    let result = tokio::select! {
        () = &mut work => if shutdown.is_cancelled() { Ok(()) } else { Err(LeaderError::WorkEnded) },
        () = until_changed_to(&manager, false, Some(GIVE_UP_AFTER)) => {
            token.cancel();
            // What has not stopped by then is dropped, before another process may lead.
            let _ = tokio::time::timeout(STOP_WITHIN, work).await;
            Err(LeaderError::Lost { namespace: namespace.to_owned(), lease: lease.to_owned() })
        }
    };
    if let Err(error) = manager.release().await {
        tracing::debug!(lease, %error, "the lease was not released; it will expire");
    }
    result
}

/// Keeps the lease going until our part in it is `leading`. With `give_up_after`, also returns when the API has failed for so long.
async fn until_changed_to(manager: &LeaseManager, leading: bool, give_up_after: Option<Duration>) {
    let mut failing_since: Option<Instant> = None;
    loop {
        let called = Instant::now();
        match manager.changed().await {
            Ok(state) if state == leading => return,
            Ok(_) => failing_since = None,
            Err(error) => {
                // A call that lasted longer has renewed in between: this failure is a new one.
                if called.elapsed() > GIVE_UP_AFTER {
                    failing_since = None;
                }
                let begun = || Instant::now().checked_sub(PATIENCE).unwrap_or(called);
                let since = *failing_since.get_or_insert_with(begun);
                tracing::warn!(%error, "can't renew or read the lease");
                if give_up_after.is_some_and(|limit| since.elapsed() >= limit) {
                    return;
                }
                tokio::time::sleep(RETRY_EVERY).await;
            }
        }
    }
}
