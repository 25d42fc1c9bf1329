//! Reading the configuration file: the I/O around [`vmfs_common::config`].

use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use vmfs_common::config::{Config, ConfigError};

/// Longest configuration file in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// A configuration file that cannot be used: one line that names the file and the place.
#[derive(Debug, thiserror::Error)]
pub enum ConfigFileError {
    /// It cannot be read.
    #[error("config {}: cannot read it: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is not a configuration.
    #[error("config {}: {source}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: ConfigError,
    },
}

/// Reads `path`; relative paths in it are taken from its directory.
///
/// # Errors
/// [`ConfigFileError`] in one line.
pub fn load(path: &Path) -> Result<Config, ConfigFileError> {
    let read = |source| ConfigFileError::Read { path: path.to_owned(), source };
    let file = std::fs::File::open(path).map_err(read)?;
    let mut text = String::new();
    let length = file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(read)?;
    if length as u64 > FILE_BYTES_MAX {
        return Err(read(io::Error::other("it is longer than 1 MiB")));
    }
    let mut config =
        Config::parse(&text).map_err(|source| ConfigFileError::Invalid { path: path.to_owned(), source })?;
    let absolute = std::path::absolute(path).map_err(read)?;
    config.resolve(absolute.parent().unwrap_or(Path::new("/")));
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_file_and_the_place() {
        let dir = std::env::temp_dir().join(format!("vmfs-config-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("vmfs.toml");
        let missing = load(&path).unwrap_err().to_string();
        assert!(missing.starts_with(&format!("config {}: cannot read it: ", path.display())), "{missing}");
        std::fs::write(&path, "host = \"a\"\ncolour = 1\n").unwrap();
        let wrong = load(&path).unwrap_err().to_string();
        assert!(wrong.starts_with(&format!("config {}: line 2, column 1: ", path.display())), "{wrong}");
        std::fs::write(&path, vec![b'#'; (1 << 20) + 1]).unwrap();
        assert!(load(&path).unwrap_err().to_string().ends_with("longer than 1 MiB"));
        std::fs::write(&path, "host = \"a\"\nstore.dir = \"s\"\nidentity.dir = \"/i\"\n").unwrap();
        let config = load(&path).unwrap();
        assert_eq!((config.store.dir, config.identity.dir), (dir.join("s"), PathBuf::from("/i")));
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
