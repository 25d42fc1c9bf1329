//! An engine in memory, with switches for everything that the mount has to cope with.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use vmfs_common::ids::ImageId;
use vmfs_fuse::backend::{
    Attempt, AttrChange, Attrs, Backend, Claim, Done, Errno, ImageStat, PinId, SizeRule, StatFs, View, Wake,
};

const BLOCK: u64 = 4096;

#[derive(Clone, Default)]
pub(crate) struct Content {
    blocks: BTreeMap<u64, Vec<u8>>,
    size: u64,
}

#[derive(Default)]
struct Image {
    path: String,
    unlinked: bool,
    owner_here: bool,
    /// Operations answer Wait.
    frozen: bool,
    content: Content,
    attrs: Attrs,
    ctime_ns: u64,
    xattrs: BTreeMap<String, Vec<u8>>,
    lineage: u64,
    version: u64,
    pins: HashMap<PinId, Content>,
    opens: usize,
    /// Path durable in the chain, for tests of ordering.
    flushed_path: String,
    wakes: Vec<Wake>,
    held: Vec<Done<()>>,
}

#[derive(Default)]
struct State {
    images: BTreeMap<ImageId, Image>,
    next: u64,
    /// Flushes stay unanswered.
    hold_flushes: bool,
    /// Flushes are answered with an error.
    fail_flushes: bool,
    flushes: u64,
    claimed_elsewhere: Vec<String>,
    events: Vec<String>,
}

/// See the module.
#[derive(Default)]
pub(crate) struct MemBackend {
    state: Mutex<State>,
    version: AtomicU64,
}

fn now_ns() -> u64 {
    u64::try_from(std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos()).unwrap()
}

impl Content {
    fn read(&self, offset: u64, len: u64, buf: &mut Vec<u8>) {
        buf.clear();
        let end = self.size.min(offset.saturating_add(len));
        let mut at = offset;
        while at < end {
            let (block, from) = (at / BLOCK, usize::try_from(at % BLOCK).unwrap());
            let to = usize::try_from((end - block * BLOCK).min(BLOCK)).unwrap();
            match self.blocks.get(&block) {
                Some(data) => buf.extend_from_slice(&data[from..to]),
                None => buf.resize(buf.len() + to - from, 0),
            }
            at = (block + 1) * BLOCK;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let from = usize::try_from(at % BLOCK).unwrap();
            let n = (4096 - from).min(data.len() - done);
            let block = self.blocks.entry(at / BLOCK).or_insert_with(|| vec![0; 4096]);
            block[from..from + n].copy_from_slice(&data[done..done + n]);
            done += n;
        }
        self.size = self.size.max(offset + data.len() as u64);
    }

    fn zero(&mut self, offset: u64, len: u64) {
        let end = (offset + len).min(self.size);
        if end <= offset {
            return;
        }
        let touched: Vec<u64> =
            self.blocks.range(offset / BLOCK..end.div_ceil(BLOCK)).map(|(b, _)| *b).collect();
        for block in touched {
            let (from, to) = (offset.max(block * BLOCK), end.min((block + 1) * BLOCK));
            if to <= from {
                continue;
            }
            // A last block that is zeroed to the end of the file is wholly zero.
            if to - from == BLOCK || (from % BLOCK == 0 && to == self.size) {
                self.blocks.remove(&block);
            } else {
                let data = self.blocks.get_mut(&block).unwrap();
                data[usize::try_from(from % BLOCK).unwrap()..][..usize::try_from(to - from).unwrap()].fill(0);
            }
        }
    }

    fn resize(&mut self, size: u64) {
        if size < self.size {
            self.zero(size, self.size - size);
        }
        self.size = size;
    }
}

#[allow(dead_code)]
impl MemBackend {
    fn changed(&self) {
        self.version.fetch_add(1, Ordering::SeqCst);
    }

    /// An image that another host owns.
    pub(crate) fn add_foreign(&self, first_byte: u8, path: &str, content: &[u8]) -> ImageId {
        let id = ImageId::from_bytes([first_byte; 16]);
        let mut image = Image { path: path.to_owned(), ..Image::default() };
        image.attrs.mode = 0o644;
        image.content.write(0, content);
        self.state.lock().images.insert(id, image);
        self.changed();
        id
    }

    pub(crate) fn id_at(&self, path: &str) -> Option<ImageId> {
        let state = self.state.lock();
        state.images.iter().find(|(_, i)| i.path == path && !i.unlinked).map(|(id, _)| *id)
    }

    pub(crate) fn set_owner(&self, id: ImageId, here: bool) {
        self.state.lock().images.get_mut(&id).unwrap().owner_here = here;
        self.changed();
    }

    /// What an update from the owner does to a copy.
    pub(crate) fn replicate(&self, id: ImageId, offset: u64, data: &[u8]) {
        let mut state = self.state.lock();
        let image = state.images.get_mut(&id).unwrap();
        image.content.write(offset, data);
        image.version += 1;
        drop(state);
        self.changed();
    }

    /// A roll-back: the chain no longer extends what was shown.
    pub(crate) fn roll_back(&self, id: ImageId, content: &[u8]) {
        let mut state = self.state.lock();
        let image = state.images.get_mut(&id).unwrap();
        image.content = Content::default();
        image.content.write(0, content);
        image.lineage += 1;
        image.version += 1;
        drop(state);
        self.changed();
    }

    pub(crate) fn set_claim(&self, id: ImageId, path: &str) {
        self.state.lock().images.get_mut(&id).unwrap().path = path.to_owned();
        self.changed();
    }

    pub(crate) fn claim_elsewhere(&self, path: &str) {
        self.state.lock().claimed_elsewhere.push(path.to_owned());
    }

    pub(crate) fn freeze(&self, id: ImageId) {
        self.state.lock().images.get_mut(&id).unwrap().frozen = true;
    }

    pub(crate) fn thaw(&self, id: ImageId) {
        let wakes = {
            let mut state = self.state.lock();
            let image = state.images.get_mut(&id).unwrap();
            image.frozen = false;
            std::mem::take(&mut image.wakes)
        };
        wakes.into_iter().for_each(|wake| wake());
    }

    pub(crate) fn fail_flushes(&self, fail: bool) {
        self.state.lock().fail_flushes = fail;
    }

    pub(crate) fn hold_flushes(&self, hold: bool) {
        let held: Vec<_> = {
            let mut state = self.state.lock();
            state.hold_flushes = hold;
            if hold { vec![] } else { state.images.values_mut().flat_map(|i| i.held.drain(..)).collect() }
        };
        held.into_iter().for_each(|done| done(Ok(())));
    }

    pub(crate) fn flushes(&self) -> u64 {
        self.state.lock().flushes
    }

    pub(crate) fn events(&self) -> Vec<String> {
        self.state.lock().events.clone()
    }

    pub(crate) fn is_unlinked(&self, id: ImageId) -> bool {
        self.state.lock().images[&id].unlinked
    }

    /// The undelete window is over.
    pub(crate) fn purge(&self, id: ImageId) {
        self.state.lock().images.remove(&id);
        self.changed();
    }

    pub(crate) fn undelete(&self, id: ImageId) {
        self.state.lock().images.get_mut(&id).unwrap().unlinked = false;
        self.changed();
    }

    pub(crate) fn opens(&self, id: ImageId) -> usize {
        self.state.lock().images[&id].opens
    }

    pub(crate) fn open_pins(&self, id: ImageId) -> usize {
        self.state.lock().images[&id].pins.len()
    }

    fn with_writer<T>(
        &self,
        id: ImageId,
        view: Option<View>,
        change: impl FnOnce(&mut Image) -> Result<T, Errno>,
    ) -> Attempt<T> {
        let mut state = self.state.lock();
        let Some(image) = state.images.get_mut(&id) else { return Attempt::err(Errno::NOENT) };
        if view.is_some_and(|v| v.lineage != image.lineage) {
            return Attempt::err(Errno::IO);
        }
        if !image.owner_here {
            return Attempt::err(Errno::ROFS);
        }
        if image.frozen {
            return Attempt::Wait;
        }
        let result = change(image);
        if result.is_ok() {
            image.attrs.mtime_ns = now_ns();
            image.ctime_ns = image.attrs.mtime_ns;
        }
        Attempt::Ready(result)
    }

    fn view<T>(&self, id: ImageId, view: View, look: impl FnOnce(&Content) -> T) -> Result<T, Errno> {
        let state = self.state.lock();
        let image = state.images.get(&id).ok_or(Errno::NOENT)?;
        match view.pin {
            Some(pin) => Ok(look(image.pins.get(&pin).ok_or(Errno::IO)?)),
            None if view.lineage == image.lineage => Ok(look(&image.content)),
            None => Err(Errno::IO),
        }
    }
}

impl Backend for MemBackend {
    fn create(&self, path: &str, attrs: &Attrs, xattrs: &[(String, Vec<u8>)]) -> Result<ImageId, Errno> {
        let mut state = self.state.lock();
        if state.claimed_elsewhere.iter().any(|p| p == path) {
            return Err(Errno::EXIST);
        }
        state.next += 1;
        let mut bytes = [0xa0; 16];
        bytes[..8].copy_from_slice(&state.next.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
        let id = ImageId::from_bytes(bytes);
        let image = Image {
            path: path.to_owned(),
            owner_here: true,
            attrs: *attrs,
            ctime_ns: now_ns(),
            xattrs: xattrs.iter().cloned().collect(),
            ..Image::default()
        };
        state.images.insert(id, image);
        drop(state);
        self.changed();
        Ok(id)
    }

    fn list(&self) -> Vec<Claim> {
        let state = self.state.lock();
        let claim = |(id, i): (&ImageId, &Image)| Claim {
            id: *id,
            path: i.path.clone(),
            unlinked: i.unlinked,
            owner_here: i.owner_here,
        };
        state.images.iter().map(claim).collect()
    }

    fn claims_version(&self) -> u64 {
        self.version.load(Ordering::SeqCst)
    }

    fn rename_claim(&self, id: ImageId, path: &str) -> Result<(), Errno> {
        let mut state = self.state.lock();
        let image = state.images.get_mut(&id).ok_or(Errno::NOENT)?;
        if !image.owner_here {
            return Err(Errno::ROFS);
        }
        if image.frozen {
            return Err(Errno::AGAIN);
        }
        if image.path != path {
            image.path = path.to_owned();
            image.ctime_ns = now_ns();
            state.events.push(format!("name {path}"));
        }
        drop(state);
        self.changed();
        Ok(())
    }

    fn unlink(&self, id: ImageId) -> Result<(), Errno> {
        let mut state = self.state.lock();
        let Some(image) = state.images.get_mut(&id) else { return Ok(()) };
        if !image.owner_here {
            return Err(Errno::ROFS);
        }
        if !image.unlinked {
            image.unlinked = true;
            let event = format!("unlink {}", image.path);
            state.events.push(event);
        }
        drop(state);
        self.changed();
        Ok(())
    }

    fn stat(&self, id: ImageId, view: Option<View>) -> Result<ImageStat, Errno> {
        let state = self.state.lock();
        let image = state.images.get(&id).ok_or(Errno::NOENT)?;
        let pinned = view.and_then(|v| v.pin).and_then(|p| image.pins.get(&p));
        let content = pinned.unwrap_or(&image.content);
        Ok(ImageStat {
            size_bytes: content.size,
            allocated_bytes: content.blocks.len() as u64 * BLOCK,
            attrs: image.attrs,
            ctime_ns: image.ctime_ns,
            writable_here: image.owner_here,
            lineage: image.lineage,
            content_version: image.version,
        })
    }

    fn set_attrs(&self, id: ImageId, change: &AttrChange) -> Result<(), Errno> {
        let mut state = self.state.lock();
        let image = state.images.get_mut(&id).ok_or(Errno::NOENT)?;
        if !image.owner_here {
            return Err(Errno::ROFS);
        }
        if image.frozen {
            return Err(Errno::AGAIN);
        }
        let a = &mut image.attrs;
        a.mode = change.mode.unwrap_or(a.mode);
        a.uid = change.uid.unwrap_or(a.uid);
        a.gid = change.gid.unwrap_or(a.gid);
        a.atime_ns = change.atime_ns.unwrap_or(a.atime_ns);
        a.mtime_ns = change.mtime_ns.unwrap_or(a.mtime_ns);
        image.ctime_ns = now_ns();
        Ok(())
    }

    fn xattr_get(&self, id: ImageId, name: &str) -> Result<Vec<u8>, Errno> {
        let state = self.state.lock();
        state.images.get(&id).ok_or(Errno::NOENT)?.xattrs.get(name).cloned().ok_or(Errno::NODATA)
    }

    fn xattr_list(&self, id: ImageId) -> Result<Vec<String>, Errno> {
        let state = self.state.lock();
        Ok(state.images.get(&id).ok_or(Errno::NOENT)?.xattrs.keys().cloned().collect())
    }

    fn xattr_set(&self, id: ImageId, name: &str, value: Option<&[u8]>) -> Result<(), Errno> {
        let mut state = self.state.lock();
        let image = state.images.get_mut(&id).ok_or(Errno::NOENT)?;
        if !image.owner_here {
            return Err(Errno::ROFS);
        }
        if image.frozen {
            return Err(Errno::AGAIN);
        }
        match value {
            Some(value) => image.xattrs.insert(name.to_owned(), value.to_vec()),
            None => image.xattrs.remove(name),
        };
        image.ctime_ns = now_ns();
        Ok(())
    }

    fn open(&self, id: ImageId, write: bool) -> Result<View, Errno> {
        let mut state = self.state.lock();
        state.next += 1;
        let pin = PinId(state.next);
        let image = state.images.get_mut(&id).ok_or(Errno::NOENT)?;
        image.opens += 1;
        if write || image.owner_here {
            return Ok(View { lineage: image.lineage, pin: None });
        }
        image.pins.insert(pin, image.content.clone());
        Ok(View { lineage: image.lineage, pin: Some(pin) })
    }

    fn close(&self, id: ImageId, view: View) {
        let mut state = self.state.lock();
        let Some(image) = state.images.get_mut(&id) else { return };
        image.opens -= 1;
        if let Some(pin) = view.pin {
            image.pins.remove(&pin);
        }
    }

    fn read(&self, id: ImageId, view: View, offset: u64, len: u32, buf: &mut Vec<u8>) -> Attempt<()> {
        if self.state.lock().images.get(&id).is_some_and(|i| i.frozen) {
            return Attempt::Wait;
        }
        Attempt::Ready(self.view(id, view, |content| content.read(offset, u64::from(len), buf)))
    }

    /// Nothing is ever in memory.
    fn read_soon(&self, _: ImageId, _: View, _: u64, _: u32, _: &mut Vec<u8>) -> Option<Attempt<()>> {
        None
    }

    fn write(&self, id: ImageId, view: View, offset: u64, data: &[u8]) -> Attempt<()> {
        self.with_writer(id, Some(view), |image| {
            image.content.write(offset, data);
            Ok(())
        })
    }

    fn zero(&self, id: ImageId, view: View, offset: u64, len: u64, size: SizeRule) -> Attempt<()> {
        self.with_writer(id, Some(view), |image| {
            if size == SizeRule::Extend {
                image.content.size = image.content.size.max(offset + len);
            }
            image.content.zero(offset, len);
            Ok(())
        })
    }

    fn allocate(&self, id: ImageId, view: View, offset: u64, len: u64, size: SizeRule) -> Attempt<()> {
        self.with_writer(id, Some(view), |image| {
            if size == SizeRule::Extend {
                image.content.size = image.content.size.max(offset + len);
            }
            Ok(())
        })
    }

    fn resize(&self, id: ImageId, view: Option<View>, size_bytes: u64) -> Attempt<()> {
        self.with_writer(id, view, |image| {
            image.content.resize(size_bytes);
            Ok(())
        })
    }

    fn seek_data(&self, id: ImageId, view: View, offset: u64) -> Result<u64, Errno> {
        self.view(id, view, |content| {
            let next = content.blocks.range(offset / BLOCK..).next().map(|(b, _)| (b * BLOCK).max(offset));
            next.filter(|at| *at < content.size && offset < content.size).ok_or(Errno::NXIO)
        })?
    }

    fn seek_hole(&self, id: ImageId, view: View, offset: u64) -> Result<u64, Errno> {
        self.view(id, view, |content| {
            if offset >= content.size {
                return Err(Errno::NXIO);
            }
            let mut block = offset / BLOCK;
            while content.blocks.contains_key(&block) {
                block += 1;
            }
            Ok((block * BLOCK).clamp(offset, content.size))
        })?
    }

    fn flush(&self, id: ImageId, _view: Option<View>, done: Done<()>) {
        let mut state = self.state.lock();
        state.flushes += 1;
        if state.fail_flushes {
            drop(state);
            return done(Err(Errno::IO));
        }
        let hold = state.hold_flushes;
        let Some(image) = state.images.get_mut(&id) else { return done(Err(Errno::NOENT)) };
        if hold {
            image.held.push(done);
            return;
        }
        image.flushed_path = image.path.clone();
        drop(state);
        done(Ok(()));
    }

    fn notify_ready(&self, id: ImageId, wake: Wake) {
        {
            let mut state = self.state.lock();
            if let Some(image) = state.images.get_mut(&id).filter(|i| i.frozen) {
                image.wakes.push(wake);
                return;
            }
        }
        wake();
    }

    fn statfs(&self) -> StatFs {
        let images = self.state.lock().images.len() as u64;
        StatFs { total_bytes: 1 << 34, free_bytes: 1 << 33, images_count: images }
    }
}
