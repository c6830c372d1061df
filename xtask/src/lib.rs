//! The part of the chores that tests call: the tidy rules, and making one component of two.

pub mod compose;
pub mod tidy;
