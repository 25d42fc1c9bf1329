//! What the catalog holds: rows and the changes to them, and their bytes.

use std::collections::BTreeMap;

use vmfs_common::codec::{CodecError, Reader, Writer};
use vmfs_common::ids::ImageId;
use vmfs_common::op::{Attrs, NAME_MAX_BYTES, PATH_MAX_BYTES, XATTR_MAX_BYTES};

/// Inode number of the mount's root directory.
pub const ROOT_INO: u64 = 1;
/// Most extended attributes of one directory or symlink.
pub const XATTRS_MAX: usize = 256;

/// Attributes of a directory or symlink. (An image's are in its chain.)
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Meta {
    /// Mode, owner, times.
    pub attrs: Attrs,
    /// Last change, nanoseconds since the epoch.
    pub ctime_ns: u64,
    /// Extended attributes.
    pub xattrs: BTreeMap<String, Vec<u8>>,
}

/// What a name stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Dir(Meta),
    /// A symbolic link.
    Symlink {
        /// Where it points, as given.
        target: Vec<u8>,
        /// Its attributes.
        meta: Meta,
    },
    /// An image that was given this name here.
    Image(ImageId),
}

/// One name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Inode number of the directory it is in; the root is in itself.
    pub parent: u64,
    /// One path component; empty for the root.
    pub name: String,
    /// What it stands for.
    pub kind: Kind,
}

/// One step of a transaction. Applying a change twice is applying it once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The row is there with this content.
    Put(u64, Row),
    /// The row is gone.
    Del(u64),
    /// The image was unlinked here; its chain has to say so, but, when another image took its
    /// name, only after that one's name is committed.
    Bury {
        /// The unlinked image.
        id: ImageId,
        /// The image that replaced it.
        after: Option<ImageId>,
    },
    /// Nothing is left to tell the chain of this image.
    Exhume(ImageId),
}

impl Meta {
    fn encode(&self, w: &mut Writer) {
        self.attrs.encode(w);
        w.u64(self.ctime_ns);
        w.count(self.xattrs.len());
        for (name, value) in &self.xattrs {
            w.var(name.as_bytes());
            w.var(value);
        }
    }

    fn decode(r: &mut Reader<'_>) -> Result<Self, CodecError> {
        let attrs = Attrs::decode(r)?;
        let ctime_ns = r.u64()?;
        let mut xattrs = BTreeMap::new();
        for _ in 0..r.count(XATTRS_MAX)? {
            let name = r.text(NAME_MAX_BYTES)?;
            if xattrs.last_key_value().is_some_and(|(last, _)| *last >= name) {
                return Err(CodecError::Invalid("order of attributes"));
            }
            xattrs.insert(name, r.var(XATTR_MAX_BYTES)?.to_vec());
        }
        Ok(Self { attrs, ctime_ns, xattrs })
    }
}

impl Row {
    fn encode(&self, w: &mut Writer) {
        w.u64(self.parent);
        w.var(self.name.as_bytes());
        match &self.kind {
            Kind::Dir(meta) => {
                w.u8(1);
                meta.encode(w);
            }
            Kind::Symlink { target, meta } => {
                w.u8(2);
                w.var(target);
                meta.encode(w);
            }
            Kind::Image(id) => {
                w.u8(3);
                w.bytes(id.as_bytes());
            }
        }
    }

    fn decode(r: &mut Reader<'_>) -> Result<Self, CodecError> {
        let parent = r.u64()?;
        let name = r.text(NAME_MAX_BYTES)?;
        let kind = match r.u8()? {
            1 => Kind::Dir(Meta::decode(r)?),
            2 => {
                let target = r.var(PATH_MAX_BYTES)?.to_vec();
                Kind::Symlink { target, meta: Meta::decode(r)? }
            }
            3 => Kind::Image(ImageId::from_bytes(r.array()?)),
            _ => return Err(CodecError::Invalid("kind of catalog row")),
        };
        Ok(Self { parent, name, kind })
    }
}

impl Change {
    /// Appends the byte form.
    pub fn encode(&self, w: &mut Writer) {
        match self {
            Self::Put(ino, row) => {
                w.u8(1);
                w.u64(*ino);
                row.encode(w);
            }
            Self::Del(ino) => {
                w.u8(2);
                w.u64(*ino);
            }
            Self::Bury { id, after } => {
                w.u8(3);
                w.bytes(id.as_bytes());
                w.bytes(after.unwrap_or_default().as_bytes());
            }
            Self::Exhume(id) => {
                w.u8(4);
                w.bytes(id.as_bytes());
            }
        }
    }

    /// Reads the byte form.
    ///
    /// # Errors
    /// When the bytes are not one.
    pub fn decode(r: &mut Reader<'_>) -> Result<Self, CodecError> {
        Ok(match r.u8()? {
            1 => {
                let ino = r.u64()?;
                Self::Put(ino, Row::decode(r)?)
            }
            2 => Self::Del(r.u64()?),
            3 => {
                let id = ImageId::from_bytes(r.array()?);
                let after = ImageId::from_bytes(r.array()?);
                Self::Bury { id, after: (!after.is_zero()).then_some(after) }
            }
            4 => Self::Exhume(ImageId::from_bytes(r.array()?)),
            _ => return Err(CodecError::Invalid("catalog change")),
        })
    }
}

/// All rows, by inode number, and the images whose unlinking is not known to be in their chain.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rows {
    /// The names.
    pub rows: BTreeMap<u64, Row>,
    /// Unlinked images, and who replaced each.
    pub buried: BTreeMap<ImageId, Option<ImageId>>,
}

impl Rows {
    /// Applies one change.
    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::Put(ino, row) => {
                self.rows.insert(*ino, row.clone());
            }
            Change::Del(ino) => {
                self.rows.remove(ino);
            }
            Change::Bury { id, after } => {
                self.buried.insert(*id, *after);
            }
            Change::Exhume(id) => {
                self.buried.remove(id);
            }
        }
    }

    /// The changes that make this state out of nothing.
    pub fn changes(&self) -> impl Iterator<Item = Change> + '_ {
        let rows = self.rows.iter().map(|(ino, row)| Change::Put(*ino, row.clone()));
        rows.chain(self.buried.iter().map(|(id, after)| Change::Bury { id: *id, after: *after }))
    }

    /// Checks what every committed state satisfies: one root, every parent a directory that leads
    /// to it, no name twice.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), String> {
        let mut names = std::collections::BTreeSet::new();
        for (ino, row) in &self.rows {
            if *ino == ROOT_INO {
                continue;
            }
            if !names.insert((row.parent, &row.name)) {
                return Err(format!("two rows are named {:?} in {}", row.name, row.parent));
            }
            let (mut at, mut steps) = (row.parent, 0);
            while at != ROOT_INO {
                match self.rows.get(&at) {
                    Some(Row { parent, kind: Kind::Dir(_), .. }) => at = *parent,
                    _ => return Err(format!("row {ino} is in {at}, which is not a directory")),
                }
                steps += 1;
                if steps > self.rows.len() {
                    return Err(format!("row {ino} is inside itself"));
                }
            }
        }
        match self.rows.get(&ROOT_INO) {
            Some(Row { kind: Kind::Dir(_), .. }) => Ok(()),
            _ => Err("there is no root".to_owned()),
        }
    }
}
