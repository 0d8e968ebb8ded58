//! Kernel parameters of a namespace.

use std::{io, path::Path};

use crate::{
    error::{Error, Result},
    namespace::Namespace,
};

/// The value of a parameter (a path below `/proc/sys/net`); none if the kernel doesn't have it.
pub(crate) fn get(namespace: &Namespace, key: &str) -> Result<Option<String>> {
    namespace.run(|| match std::fs::read_to_string(Path::new("/proc/sys/net").join(key)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        other => Ok(Some(other?.trim().to_owned())),
    })
}

/// Sets parameters (paths below `/proc/sys/net`) in a namespace. Those that the kernel doesn't have are skipped.
pub(crate) fn set(namespace: &Namespace, parameters: &[(&str, &str)]) -> Result<()> {
    let failed = namespace.run(|| {
        Ok(parameters.iter().find_map(|(key, value)| {
            // /proc/sys/net shows the parameters of the namespace of the thread that opens them.
            let path = Path::new("/proc/sys/net").join(key);
            match std::fs::read_to_string(&path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => None,
                Ok(current) if current.trim() == *value => None,
                _ => std::fs::write(&path, value).err().map(|e| ((*key).to_owned(), (*value).to_owned(), e)),
            }
        }))
    })?;
    match failed {
        None => Ok(()),
        Some((key, value, source)) => {
            Err(Error::Sysctl { key, value, place: namespace.path().display().to_string(), source })
        }
    }
}
