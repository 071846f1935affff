//! `ferry`: every role of FerryMQ, and the tool to run them. Exit code 0 done, 1 failed, 2 usage, 3 unreachable.

mod cli;
mod dev;
mod roles;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    let runtime = match cli.command.is_server() {
        true => tokio::runtime::Builder::new_multi_thread().enable_all().build(),
        // A command is one connection and one answer.
        false => tokio::runtime::Builder::new_current_thread().enable_all().build(),
    };
    let result = match runtime {
        Ok(runtime) => {
            let result = runtime.block_on(cli::run(cli));
            runtime.shutdown_background();
            result
        }
        Err(e) => Err(e.into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ferry: {error:#}");
            ExitCode::from(cli::exit_code(&error))
        }
    }
}
