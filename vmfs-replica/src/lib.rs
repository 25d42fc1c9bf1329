//! placeholder

pub mod api;
