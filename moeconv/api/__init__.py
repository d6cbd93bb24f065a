"""The commands as functions, for use from Python; `moeconv` itself offers them by the same names."""
