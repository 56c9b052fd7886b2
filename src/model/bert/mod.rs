//! The BERT family (Devlin et al. 2019), as a classifier of whole sequences.

mod tensors;

pub use tensors::base_tensors;
