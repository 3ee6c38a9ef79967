//go:build tools

// Package tools names the command to build, so that its module is a requirement.
package tools

import _ "github.com/grafana/loki/v3/cmd/loki"
