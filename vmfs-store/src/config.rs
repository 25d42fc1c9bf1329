//! Sizes and bounds.

/// Sizes and bounds of a store. [`StoreConfig::default`] suits a host with tens of images.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// Largest segment a growing log uses (64 MiB). A single update that needs more still gets it.
    pub segment_bytes_max: u64,
    /// Host-wide bound for cached map pages and for map changes not yet checkpointed (64 MiB).
    pub map_cache_bytes: u64,
    /// A checkpoint is due after this many bytes of log (64 MiB): bounds recovery time.
    pub checkpoint_log_bytes: u64,
    /// Background rounds with few appends after which scattered blocks are put in order (100: ten seconds).
    pub gather_after_rounds: u32,
    /// Prewritten segments kept ready per size class in use (2).
    pub pool_segments: usize,
    /// Bytes of segments beyond those that nobody uses any more and that are kept for who needs some next, until
    /// nobody has for 30 s (512 MiB): to make one anew costs more, and so does to delete one.
    pub idle_bytes_max: u64,
    /// Space kept back for control updates, checkpoints, promises and deletion (16 MiB).
    pub reserve_bytes: u64,
    /// Log kept per image for members that lag, beyond what content and checkpoints need (1 GiB).
    pub retain_log_bytes_max: u64,
    /// Most files open at a time (512).
    pub open_files_max: usize,
    /// Threads that recover images at open (2); 1 is deterministic.
    pub recovery_threads: usize,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            segment_bytes_max: 64 << 20,
            map_cache_bytes: 64 << 20,
            checkpoint_log_bytes: 64 << 20,
            gather_after_rounds: 100,
            pool_segments: 2,
            idle_bytes_max: 512 << 20,
            reserve_bytes: 16 << 20,
            retain_log_bytes_max: 1 << 30,
            open_files_max: 512,
            recovery_threads: 2,
        }
    }
}
