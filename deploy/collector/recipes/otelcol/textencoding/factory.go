// Package textencoding writes log bodies as plain lines. It stands in for contrib's text_encoding extension
// (extension/encoding/textencodingextension), whose type name, keys and output for logs it has.
package textencoding

import (
	"context"
	"fmt"
	"strings"

	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/extension"
	"go.opentelemetry.io/collector/pdata/plog"
)

// Config has the keys of contrib's extension. Only UTF-8 can be written here.
type Config struct {
	Encoding              string `mapstructure:"encoding"`
	MarshalingSeparator   string `mapstructure:"marshaling_separator"`
	UnmarshalingSeparator string `mapstructure:"unmarshaling_separator"`
}

// Validate refuses what this stand-in cannot do.
func (c *Config) Validate() error {
	if c.Encoding != "utf8" && c.Encoding != "utf-8" {
		return fmt.Errorf("encoding %q: only utf8 is here", c.Encoding)
	}
	return nil
}

// NewFactory is what the builder calls.
func NewFactory() extension.Factory {
	return extension.NewFactory(
		component.MustNewType("text_encoding"),
		func() component.Config { return &Config{Encoding: "utf8", MarshalingSeparator: "\n"} },
		func(_ context.Context, _ extension.Settings, config component.Config) (extension.Extension, error) {
			return &encoding{separator: config.(*Config).MarshalingSeparator}, nil
		},
		component.StabilityLevelDevelopment,
	)
}

type encoding struct{ separator string }

func (*encoding) Start(context.Context, component.Host) error { return nil }
func (*encoding) Shutdown(context.Context) error              { return nil }

// MarshalLogs is plog.Marshaler: every body, with the separator between them. The file exporter ends each export itself.
func (e *encoding) MarshalLogs(logs plog.Logs) ([]byte, error) {
	var bodies []string
	for _, resource := range logs.ResourceLogs().All() {
		for _, scope := range resource.ScopeLogs().All() {
			for _, record := range scope.LogRecords().All() {
				bodies = append(bodies, record.Body().AsString())
			}
		}
	}
	return []byte(strings.Join(bodies, e.separator)), nil
}
