//! The part of the chores that tests call: the tidy rules.

pub mod tidy;
