// Reads a compose file as `docker compose config` does, with the same loader, and prints the project as JSON.
//
//	compose-config docker-compose.yml [profile …]     variables come from the environment
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/compose-spec/compose-go/v2/cli"
)

func main() {
	options, err := cli.NewProjectOptions([]string{os.Args[1]}, cli.WithOsEnv, cli.WithName("skyrl-otel"), cli.WithProfiles(os.Args[2:]))
	if err == nil {
		project, loadErr := options.LoadProject(context.Background())
		err = loadErr
		if err == nil {
			text, marshalErr := project.MarshalJSON()
			err = marshalErr
			fmt.Println(string(text))
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
