//! placeholder

pub mod api;
pub mod config_file;
pub mod control;
pub mod daemon;
pub mod node;
pub mod pid_file;
pub mod sd_notify;
