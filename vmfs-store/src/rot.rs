//! Damage that was found on the disk, and what became of it: what `status` shows.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use vmfs_common::ImageId;

/// Unrepaired places remembered for each image; more are counted and not named.
const OPEN_MAX: usize = 1024;

/// Damage of one image, or of what all images share.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rot {
    /// Damaged places found since the store was opened.
    pub found: u64,
    /// Of those, how many are whole again.
    pub repaired: u64,
    /// The others, in words.
    pub open: Vec<String>,
}

#[derive(Default)]
struct Account {
    found: u64,
    repaired: u64,
    /// What is not repaired, and in which pass it was last seen.
    open: BTreeMap<String, u64>,
    pass: u64,
}

/// The accounts of all images; `None` is for what they share.
#[derive(Default)]
pub(crate) struct Ledger(Mutex<BTreeMap<Option<ImageId>, Account>>);

impl Ledger {
    /// Notes damage, and logs it once as long as it is not repaired.
    pub(crate) fn found(&self, image: Option<ImageId>, what: &str) {
        let mut all = self.0.lock();
        let account = all.entry(image).or_default();
        let pass = account.pass;
        if let Some(seen) = account.open.get_mut(what) {
            *seen = pass;
            return;
        }
        account.found += 1;
        if account.open.len() < OPEN_MAX {
            account.open.insert(what.to_owned(), pass);
        }
        drop(all);
        match image {
            Some(image) => tracing::error!(%image, "damage found: {what}"),
            None => tracing::error!("damage found: {what}"),
        }
    }
    /// Notes that something found before is whole again.
    pub(crate) fn repaired(&self, image: Option<ImageId>, what: &str, how: &str) {
        let mut all = self.0.lock();
        let account = all.entry(image).or_default();
        account.open.remove(what);
        account.repaired += 1;
        drop(all);
        match image {
            Some(image) => tracing::warn!(%image, "damage repaired: {what} ({how})"),
            None => tracing::warn!("damage repaired: {what} ({how})"),
        }
    }
    /// As [`Ledger::repaired`], if it was found before.
    pub(crate) fn settle(&self, image: ImageId, what: &str, how: &str) {
        let open = self.0.lock().get(&Some(image)).is_some_and(|a| a.open.contains_key(what));
        if open {
            self.repaired(Some(image), what, how);
        }
    }
    /// Damage that was repaired in the moment it was found.
    pub(crate) fn found_and_repaired(&self, image: Option<ImageId>, what: &str, how: &str) {
        self.found(image, what);
        self.repaired(image, what, how);
    }
    /// A look at everything begins.
    pub(crate) fn begin_pass(&self, image: Option<ImageId>) {
        self.0.lock().entry(image).or_default().pass += 1;
    }
    /// It has ended: what it did not meet again was overwritten since, or is no longer kept.
    pub(crate) fn end_pass(&self, image: Option<ImageId>) {
        let mut all = self.0.lock();
        let account = all.entry(image).or_default();
        let pass = account.pass;
        account.open.retain(|_, seen| *seen == pass);
    }
    pub(crate) fn get(&self, image: Option<ImageId>) -> Rot {
        let all = self.0.lock();
        all.get(&image).map_or_else(Rot::default, |a| Rot {
            found: a.found,
            repaired: a.repaired,
            open: a.open.keys().cloned().collect(),
        })
    }
    pub(crate) fn forget(&self, image: ImageId) {
        self.0.lock().remove(&Some(image));
    }
}
