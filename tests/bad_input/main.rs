//! Wrong arguments give the typed error that names them, before any output is touched; nothing panics or allocates
//! by a size that no slice backs.

mod call;
mod loss;
mod messages;
mod operators;
mod settings;
mod support;
