//! Every CPU operator against plain loops, against finite differences, and against what its documentation promises.

mod data;
mod divergences;
mod formulas;
mod lm_head;
mod loss;
mod norms;
mod operators;
mod promises;
mod reference;
mod support;
