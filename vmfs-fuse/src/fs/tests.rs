//! The file system against a naive model, with power cuts in between.

mod claims;
mod model;
