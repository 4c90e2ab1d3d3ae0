// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Random programs of calls (`testkit::model`), each as short as it can be where it fails.

mod run;
mod terabyte;
