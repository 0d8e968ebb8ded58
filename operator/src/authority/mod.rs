//! The certificate authority of a Portolan: its key lives in the Secret `portolan-ca`, its certificate also in a ConfigMap.

mod issue;
mod keep;
mod request;
mod signer;

pub use issue::{Authority, AuthorityError, Pem};
pub use keep::{KeepError, load_or_create};
pub use signer::run;
