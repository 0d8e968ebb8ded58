//! Keys of encrypted datasets.

use super::{CommandLine, already};
use crate::error::ZfsError;
use crate::key::Key;
use crate::name::DatasetName;

impl CommandLine {
    pub(super) async fn key_in(&self, name: &DatasetName, key: &Key) -> Result<(), ZfsError> {
        let words = ["zfs", "load-key", "-L", "prompt", name.as_str()].map(str::to_owned);
        self.need("encryption", |can| can.encryption, &words.join(" ")).await?;
        match self.run_with_key(name, &words, key).await {
            // It is not looked at then. A dry run looks.
            Err(error) if error.stderr.contains("Key already loaded") => {
                let words = ["zfs", "load-key", "-n", "-L", "prompt", name.as_str()].map(str::to_owned);
                self.run_with_key(name, &words, key).await
            }
            result => result,
        }
    }

    pub(super) async fn key_out(&self, name: &DatasetName) -> Result<(), ZfsError> {
        let words = ["zfs", "unload-key", name.as_str()];
        self.need("encryption", |can| can.encryption, &words.join(" ")).await?;
        already(self.run_unless_busy(name, &words).await, "Key already unloaded")
    }
}
